"""A Slurm that is not there: answers as text, time that is told to pass, faults on a seed, and jobs that play a trial.

What it promises is what Slurm does by `specs`: one job of a name at a time (singleton), a requeued job waits for two
minutes, ended jobs are shown for five, accounting forgets nothing, a lost answer says nothing about the request.
"""

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrate.launchers.slurm_commands import Answer
from tests.sweep.simulated_trial import Fate, PlayedRun, Script

SHOWN_SECONDS = 300.0
HOLD_SECONDS = 121.0
NO_CONTACT = Answer(1, err="squeue: error: Unable to contact slurm controller (connect failure)")
NO_REPLY = Answer(1, err="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
FULL = Answer(1, err="sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job "
              "violates accounting/QOS policy (job submit limit, user's size and/or time limits)")  # fmt: skip


class ControllerDiedError(BaseException):
    """The controller's process is gone, wherever it was."""


@dataclass
class SimulatedJob:
    """A job as Slurm keeps it."""

    id: int
    script: Script
    submitted: float
    begins: float
    state: str = "PENDING"
    restarts: int = 0
    started: float | None = None
    ended: float | None = None
    preempted: float | None = None
    node: str = ""
    run: PlayedRun | None = None

    @property
    def is_over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Odds:
    """How likely each fault is.

    Attributes:
        silence: a question gets no answer.
        lost_reply: sbatch takes a job, but the answer is lost; late: it takes it minutes later, too.
        death: the controller dies right after sbatch took a job.
        twice: squeue shows each job twice.
    """

    silence: float = 0.0
    lost_reply: float = 0.0
    late: float = 0.0
    death: float = 0.0
    twice: float = 0.0


@dataclass
class Bill:
    """What Slurm itself counts: a run of a job, from its start to its end."""

    job: int
    name: str
    state: str
    started: float
    ended: float
    ranks: int
    node: str


@dataclass
class SimulatedSlurm:
    """Slurm's commands, and its nodes.

    Args:
        folder: `runs`, in which jobs play.
        seed: of everything that happens by chance.
        fate: what happens to a run of a job.
        odds: of faults of Slurm itself.
        nodes: each runs `per_node` jobs.
        accounting: whether sacct answers.
        most_jobs: that may be queued or running; 0 is no limit.
        bad_nodes: on which every run hangs.
        waits: how long jobs that were requeued have waited, with room for them or not.
    """

    folder: Path
    seed: int
    fate: Callable[[random.Random], Fate]
    odds: Odds = field(default_factory=Odds)
    nodes: int = 64
    per_node: int = 4
    accounting: bool = True
    most_jobs: int = 0
    bad_nodes: frozenset[str] = frozenset()
    waits: list[float] = field(default_factory=list)
    now: float = 1.7e9
    calls: Counter[str] = field(default_factory=Counter)
    bills: list[Bill] = field(default_factory=list)
    deaths: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.jobs: dict[int, SimulatedJob] = {}
        self._ids = itertools.count(100)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pending: dict[int, SimulatedJob] = {}
        self._running: dict[str, SimulatedJob] = {}
        self._queued_by_name: defaultdict[str, list[int]] = defaultdict(list)
        self._places = [f"n{number}" for number in range(self.nodes)] * self.per_node
        self._shown: dict[int, SimulatedJob] = {}

    # Time

    def clock(self) -> float:
        return self.now

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), what))

    def pass_time(self, seconds: float) -> None:
        """Let everything happen that happens in this time."""
        until = self.now + seconds
        self._start_jobs()
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self._start_jobs()
        self.now = until
        self._shown = {
            job.id: job for job in self._shown.values() if not job.is_over or until - (job.ended or 0.0) < SHOWN_SECONDS
        }

    # Jobs

    def take(self, script: Script) -> int:
        """Queue a job."""
        job = SimulatedJob(next(self._ids), script, self.now, self.now)
        self.jobs[job.id] = self._pending[job.id] = self._shown[job.id] = job
        self._queued_by_name[script.name].append(job.id)
        return job.id

    def _start_jobs(self) -> None:
        if not self._places:
            return
        for job in list(self._pending.values()):
            first = self._queued_by_name[job.script.name][0]
            if job.begins > self.now or job.script.name in self._running or first != job.id:
                continue
            if node := self._take_place(job):
                self._start(job, node)
            if not self._places:
                return

    def _take_place(self, job: SimulatedJob) -> str:
        """Take a random free place on a node that the job does not exclude; empty if a few tries find none."""
        places = self._places
        for _ in range(20):
            index = self.random.randrange(len(places))
            if places[index] not in job.script.exclude:
                places[index], places[-1] = places[-1], places[index]
                return places.pop()
        return ""

    def _start(self, job: SimulatedJob, node: str) -> None:
        del self._pending[job.id]
        assert job.script.name not in self._running, f"{job.script.name}: two live attempts"
        self._running[job.script.name] = job
        job.state, job.started, job.node, job.ended = "RUNNING", self.now, node, None
        if job.restarts:
            self.waits.append(self.now - job.submitted)
        fate = Fate("hangs", 60.0) if node in self.bad_nodes else self.fate(self.random)
        run = PlayedRun(job.script, str(job.id), job.restarts, node, self.now, fate)
        job.run = run
        self.after(run.seconds, lambda: self._end(job, run))

    def _end(self, job: SimulatedJob, run: PlayedRun) -> None:
        """Let a run end as it is fated to, unless something has ended it before."""
        if job.run is not run:
            return
        if run.fate.kind == "node lost":
            for other in [each for each in self._running.values() if each.node == job.node and each.run]:
                assert other.run is not None
                other.run.cut_short(self.now, "node lost")
                self._finish(other)
            return
        self._finish(job)

    def _finish(self, job: SimulatedJob) -> None:
        run = job.run
        assert run is not None and job.started is not None
        job.run, job.ended = None, self.now
        del self._running[job.script.name]
        self._places.append(job.node)
        word = run.play(self.now, lambda: self.take(job.script))
        self.bills.append(Bill(job.id, job.script.name, word, job.started, self.now, job.script.ranks, job.node))
        if word in ("NODE_FAIL", "PREEMPTED"):
            job.preempted = self.now if word == "PREEMPTED" else job.preempted
            self._requeue(job)
        else:
            job.state = word
            self._queued_by_name[job.script.name].remove(job.id)

    def _requeue(self, job: SimulatedJob) -> None:
        job.state, job.restarts, job.started, job.ended = "PENDING", job.restarts + 1, None, None
        job.submitted, job.begins = self.now, self.now + HOLD_SECONDS
        self._pending[job.id] = job
        self.after(HOLD_SECONDS, lambda: None)

    @property
    def num_live(self) -> int:
        return len(self._pending) + len(self._running)

    @property
    def rank_hours(self) -> float:
        return sum((bill.ended - bill.started) * bill.ranks for bill in self.bills) / 3600

    # Commands

    def run(self, *words: str, text: str = "") -> Answer:
        """Answer a command of Slurm."""
        command = words[0]
        self.calls[command] += 1
        if command in ("squeue", "scancel", "scontrol") and self.random.random() < self.odds.silence:
            return NO_CONTACT
        return getattr(self, f"_{command}")(words[1:])  # type: ignore[no-any-return]

    def _sbatch(self, words: tuple[str, ...]) -> Answer:
        script = Script.read(Path(words[-1]))
        if self.most_jobs and self.num_live >= self.most_jobs:
            return FULL
        chance = self.random.random()
        if chance < self.odds.late:
            self.after(self.random.randint(10, 400), lambda: self._take_late(script))
            return NO_REPLY
        job = self.take(script)
        if chance < self.odds.late + self.odds.lost_reply:
            return NO_REPLY
        if self.random.random() < self.odds.death:
            self.deaths += 1
            raise ControllerDiedError
        return Answer(0, f"Submitted batch job {job}\n")

    def _take_late(self, script: Script) -> None:
        self.take(script)

    def _squeue(self, words: tuple[str, ...]) -> Answer:
        fields = [field.split(":") for field in _option(words, "--Format").split(",")]
        twice = 2 if self.random.random() < self.odds.twice else 1
        rows = [self._row(job) for job in self._shown.values()]
        lines = ["".join(row[name][: int(width)].ljust(int(width)) for name, width in fields) for row in rows]
        return Answer(0, "\n".join(lines * twice) + "\n" if lines else "")

    def _row(self, job: SimulatedJob) -> dict[str, str]:
        held = job.state == "PENDING" and job.begins > self.now
        start = job.started if job.started is not None else job.begins if held else None
        return {
            "JobArrayID": str(job.id),
            "JobID": str(job.id),
            "State": job.state,
            "RestartCnt": str(job.restarts),
            "Reason": "BeginTime" if held else "Resources" if job.state == "PENDING" else "None",
            "StartTime": _time(start),
            "EndTime": _time(job.ended),
            "SubmitTime": _time(job.submitted),
            "PreemptTime": _time(job.preempted),
            "NodeList": job.node if job.started is not None else "",
            "Name": job.script.name,
            "Comment": "",
        }

    def _sacct(self, words: tuple[str, ...]) -> Answer:
        if not self.accounting:
            return Answer(1, err="Slurm accounting storage is disabled")
        ended = [f"{b.job}|{b.job}|{b.state}|{_time(b.started)}|{_time(b.ended)}|{b.node}" for b in self.bills]
        return Answer(0, "\n".join(ended) + "\n")

    def _scancel(self, words: tuple[str, ...]) -> Answer:
        wanted = _option(words, "--state")
        for word in words:
            job = self.jobs.get(int(word)) if word.isdigit() else None
            if job is None or job.state != wanted:
                continue
            if job.run is not None:
                self._shorten(job, job.run, "asked to stop")
            elif job.state == "PENDING":
                del self._pending[job.id]
                self._queued_by_name[job.script.name].remove(job.id)
                job.state, job.ended = "CANCELLED", self.now
        return Answer(0)

    def _shorten(self, job: SimulatedJob, run: PlayedRun, kind: str) -> None:
        """Let a job save and stop; it takes a moment."""
        run.cut_short(self.now + 20.0, kind)
        self.after(20.0, lambda: self._end(job, run))

    def _scontrol(self, words: tuple[str, ...]) -> Answer:
        if words[0] == "update":
            ids = next(word for word in words if word.startswith("JobId=")).removeprefix("JobId=")
            delay = float(words[-1].removeprefix("StartTime=now+"))
            for number in map(int, ids.split(",")):
                if self.jobs[number].state == "PENDING":
                    self.jobs[number].begins = self.now + delay
                    self.after(delay, lambda: None)
        return Answer(0)

    def bills_by_name(self) -> dict[str, list[Bill]]:
        found: dict[str, list[Bill]] = defaultdict(list)
        for bill in self.bills:
            found[bill.name].append(bill)
        return found


def _option(words: tuple[str, ...], name: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def _time(seconds: float | None) -> str:
    """Write a time as Slurm does where it is asked for Unix seconds: whole ones."""
    return "N/A" if seconds is None else str(int(seconds))
