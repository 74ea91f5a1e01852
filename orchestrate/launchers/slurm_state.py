"""Say where the job of a trial is, from the queue, from accounting, and from what the job left in its folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrate.exits import SIGNAL_BASE, Exit
from orchestrate.launchers.attempts import exit_file, job_file, jobs_folder, list_numbers, submission_file, verdict_file
from orchestrate.launchers.base import JobState, Phase, Verdict
from orchestrate.launchers.slurm_queue import Row, Run, run_of
from orchestrate.runs import RunDir, read_json

# A job that squeue does not show may have been submitted since, or have a queue of its own; after this it is gone.
PATIENCE_SECONDS = 90.0
# Slurm drains a node that cannot launch a job, so the next try is on another one.
_LAUNCHES_TO_REPEAT = 5
_CLOCK_SECONDS = 60.0  # by which the clocks of two hosts may differ


@dataclass(frozen=True)
class KeptRun:
    """One run of a job, as its keeper recorded it.

    Attributes:
        number: of the attempt.
        job, restart: id of the Slurm job, and how often it had been requeued.
        started, seen: unix times of the start and of the last sign of life.
        nodes: where it ran.
        ended: unix time of the recorded end; None without a record.
        exit_code: recorded; None without a record, or if a later keeper found that there was none.
        following: what the keeper did for a continuation, in words; empty if nothing.
        verdict: what Slurm said of its end, if the controller has recorded it.
    """

    number: int
    job: str
    restart: int
    started: float
    seen: float = 0.0
    nodes: tuple[str, ...] = ()
    ended: float | None = None
    exit_code: int | None = None
    following: str = ""
    verdict: Verdict | None = None

    @property
    def tells_why(self) -> bool:
        """Whether its exit code explains its end without a word of Slurm's."""
        code = self.exit_code
        return code is not None and code != Exit.PEER_LOST and code < SIGNAL_BASE

    def is_run_of(self, row: Row) -> bool:
        """Tell whether a row of the queue is about this run, and not about an earlier or later one of the job."""
        return row.is_job(self.job) and row.restarts == self.restart


@dataclass(frozen=True)
class Submission:
    """The last job that was submitted for a name: the unix time, and its id; empty if Slurm gave no answer."""

    job: str
    time: float


@dataclass(frozen=True)
class Sight:
    """Everything that is known of the jobs of one name.

    Attributes:
        rows: of the queue, in any order.
        runs: recorded, in the order of their numbers; at least the last, and all whose end is unexplained.
        next_attempt: number that no attempt has used.
        submission: None if nothing was ever submitted from here.
        dropped: verdicts of attempts that never began.
        now: unix time at which the queue was read.
        accounting: what sacct showed; empty if it was not asked.
    """

    rows: Sequence[Row]
    runs: Sequence[KeptRun]
    next_attempt: int
    submission: Submission | None
    now: float
    dropped: Sequence[tuple[int, Verdict]] = ()
    accounting: Sequence[Run] = field(default=(), compare=False)

    @property
    def live(self) -> Row | None:
        """The job that runs, or else the newest that waits."""
        live = [row for row in self.rows if row.running or row.queued(self.now)]
        return max(live, key=lambda row: (row.running, row.submitted or 0.0), default=None)

    @property
    def open_runs(self) -> list[KeptRun]:
        """Runs whose end only Slurm can explain, as far as the queue does not do it."""
        live = self.live
        ended = [run for run in self.runs if live is None or not self._is_running(run, live)]
        return [run for run in ended if self._needs_verdict(run, live) and self._queue_verdict(run) is None]

    @property
    def vanished(self) -> Submission | None:
        """The last submission, if its job never began and the queue does not show it."""
        job = self.submission.job if self.submission else ""
        known = any(run.job == job for run in self.runs) or any(row.is_job(job) for row in self.rows)
        return None if not job or known or self.live else self.submission

    def _is_running(self, run: KeptRun, row: Row) -> bool:
        # A job that is requeued counts the restart while its last run still ends.
        is_last = run is self.runs[-1]
        return row.running and is_last and row.is_job(run.job) and run.ended is None

    def _needs_verdict(self, run: KeptRun, live: Row | None) -> bool:
        if run.verdict:
            return False
        stopped = run.exit_code == Exit.CONTINUE and run is self.runs[-1] and live is None
        return stopped or not run.tells_why

    def _queue_verdict(self, run: KeptRun) -> Verdict | None:
        own = (row for row in self.rows if run.is_run_of(row) and row.final(self.now))
        return next((row.verdict for row in own), None)

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """What Slurm says of the attempts that have ended and whose files do not hold it."""
        found = {}
        for run in self.runs:
            if run.verdict or ((live := self.live) and self._is_running(run, live)):
                continue
            verdict = self._queue_verdict(run)
            if verdict is None and (entry := run_of(self.accounting, run.job, run.started)):
                verdict = entry.verdict
            if verdict is not None:
                found[run.number] = verdict
        return found

    @property
    def never_began(self) -> tuple[str, Verdict] | None:
        """The last job that ended before it began, after everything else; with what Slurm says of it."""
        last = self.runs[-1] if self.runs else None
        after = (last.ended or last.started) if last else 0.0
        mine = [row for row in self.rows if row.final(self.now) and not any(run.is_run_of(row) for run in self.runs)]
        new = [row for row in mine if (row.end or row.submitted or 0.0) >= after and (last or self._is_submitted(row))]
        if new:
            newest = max(new, key=lambda row: row.end or row.submitted or 0.0)
            return newest.job, newest.verdict
        if (gone := self.vanished) and (entry := run_of(self.accounting, gone.job, None)):
            return gone.job, entry.verdict
        return None

    def _is_submitted(self, row: Row) -> bool:
        """Tell whether a row is about the last submission, and not about a job for a folder that is there no more."""
        if self.submission is None or self.submission.job:
            return self.submission is not None and row.is_job(self.submission.job)
        return (row.submitted or 0.0) >= self.submission.time - _CLOCK_SECONDS


def job_state(sight: Sight) -> JobState | None:
    """Say where the latest job of a name is; None if there never was one, or nothing of it is left."""
    if (row := sight.live) is not None:
        return _live(sight, row)
    strange = next((row for row in sight.rows if not row.final(sight.now)), None)
    if strange is not None:
        evidence = f"squeue shows job {strange.job} in a state that is not known here: {strange.state}"
        return JobState(Phase.UNKNOWN, strange.job, sight.next_attempt - 1, evidence, verdicts=sight.verdicts)
    if (dropped := sight.never_began) is not None:
        return _never_began(sight, *dropped)
    if (gone := sight.vanished) is not None and sight.now - gone.time < PATIENCE_SECONDS:
        evidence = f"job {gone.job} was submitted {sight.now - gone.time:.0f} s ago, and squeue does not show it"
        return JobState(Phase.UNKNOWN, gone.job, sight.next_attempt, evidence, verdicts=sight.verdicts)
    if sight.dropped and (not sight.runs or sight.dropped[-1][0] > sight.runs[-1].number):
        number, verdict = sight.dropped[-1]
        evidence = f"{verdict.source}: the job was {verdict.state} before its ranks were started"
        return JobState(Phase.FINISHED, "", number, evidence, ended=verdict.ended, verdicts=sight.verdicts)
    return _ended(sight, sight.runs[-1]) if sight.runs else None


def _live(sight: Sight, row: Row) -> JobState:
    if not row.running:
        why = f" ({row.reason})" if row.reason not in ("", "None") else ""
        evidence = f"squeue: job {row.job} is {row.state}{why}"
        return replace(
            JobState(
                Phase.QUEUED, row.job, sight.next_attempt, evidence, held=row.held(sight.now), verdicts=sight.verdicts
            ),
            **_hold(sight, row),
        )
    own = [run for run in sight.runs if run.is_run_of(row)]
    own = own or [run for run in sight.runs if row.state == "COMPLETING" and row.is_job(run.job)]
    number, nodes = (own[-1].number, own[-1].nodes) if own else (sight.next_attempt, ())
    nodes = row.nodes or nodes
    where = f" on {', '.join(nodes[:4])}{', ...' if len(nodes) > 4 else ''}" if nodes else ""
    fate = ", being preempted" if row.preempted else ""
    evidence = f"squeue: job {row.job} is {row.state}{where}{fate}"
    return JobState(Phase.RUNNING, row.job, number, evidence, verdicts=sight.verdicts, nodes=nodes)


def _hold(sight: Sight, row: Row) -> dict[str, Any]:
    """Say what a job that Slurm holds waits for: for us if a node could not launch it, else for a person."""
    if not row.on_hold:
        return {}
    # Every launch that fails counts as a restart, as does whatever ended the last run that began.
    last = next((run for run in reversed(sight.runs) if row.is_job(run.job)), None)
    num_failures = row.restarts - (last.restart + 1 if last else 0)
    if row.launch_failed and num_failures <= _LAUNCHES_TO_REPEAT:
        return {"held": True}
    return {"hold": f"scontrol release {row.job}", "given_up": row.launch_failed}


def _never_began(sight: Sight, job: str, verdict: Verdict) -> JobState:
    # Perhaps its script failed before the keeper, in the lines of the user's own.
    told = f"; see logs/slurm-{job}.log" if verdict.nodes else ""
    evidence = f"{verdict.source}: job {job} was {verdict.state} before its ranks were started{told}"
    for number, known in sight.dropped:
        if (known.state, known.ended) == (verdict.state, verdict.ended):
            ended = verdict.ended
            return JobState(Phase.FINISHED, job, number, evidence, ended=ended, verdicts=sight.verdicts)
    verdicts = sight.verdicts | {sight.next_attempt: verdict}
    return JobState(Phase.FINISHED, job, sight.next_attempt, evidence, ended=verdict.ended, verdicts=verdicts)


def _ended(sight: Sight, run: KeptRun) -> JobState:
    """Say how the last run ended that is in no queue."""
    verdicts = sight.verdicts
    verdict = verdicts.get(run.number) or run.verdict
    told = f"; {verdict.source}: {verdict.state}" if verdict else ""
    if run.ended is not None:
        code = "no exit code" if run.exit_code is None else f"exit code {run.exit_code}"
        evidence = f"job {run.job}: {code}{told}"
        return JobState(
            Phase.FINISHED, run.job, run.number, evidence, exit_code=run.exit_code, ended=run.ended, verdicts=verdicts
        )
    if verdict is not None:
        evidence = f"{verdict.source}: job {run.job} is {verdict.state}; it left no exit code"
        ended = verdict.ended or run.seen
        return JobState(Phase.FINISHED, run.job, run.number, evidence, ended=ended, verdicts=verdicts)
    silent = sight.now - run.seen
    evidence = f"squeue does not show job {run.job}, whose last sign of life is {silent:.0f} s old"
    phase = Phase.LOST if silent > PATIENCE_SECONDS else Phase.UNKNOWN
    return JobState(phase, run.job, run.number, evidence, verdicts=verdicts)


@dataclass(frozen=True)
class Records:
    """What the files in the folder of a job say; see `Sight`."""

    runs: tuple[KeptRun, ...]
    dropped: tuple[tuple[int, Verdict], ...]
    next_attempt: int
    submission: Submission | None


def read_records(run: RunDir, settled: Collection[int]) -> Records:
    """Read what the jobs of a folder left.

    Args:
        run: folder of the jobs.
        settled: numbers of attempts that need not be read any more; the last attempt is always read.
    """
    if not jobs_folder(run).is_dir():  # as for most of the trials of a large sweep, most of the time
        return Records((), (), 1, None)
    numbers = list_numbers(run)
    kept, used = numbers.jobs, numbers.used
    open_numbers = [number for number in kept if number not in settled or number == kept[-1]]
    runs = tuple(_kept_run(run, number, is_judged=number in numbers.judged) for number in open_numbers)
    never = [number for number in used if number not in kept and number not in settled]
    dropped = tuple((number, verdict) for number in never if (verdict := _verdict(verdict_file(run, number))))
    last = read_json(submission_file(run)) or {}
    submission = Submission(str(last["job"]), float(last["time"])) if {"job", "time"} <= last.keys() else None
    return Records(runs, dropped, (used[-1] if used else 0) + 1, submission)


def _kept_run(run: RunDir, number: int, *, is_judged: bool) -> KeptRun:
    start: dict[str, Any] = read_json(job_file(run, number)) or {}
    end: dict[str, Any] = read_json(exit_file(run, number)) or {}
    started = float(start.get("started") or 0.0)
    # A verdict about an earlier end is that of a job which had the number before and never began.
    verdict = _verdict(verdict_file(run, number)) if is_judged else None
    worker = {} if end else read_json(run.attempt_file(number)) or {}
    return KeptRun(
        number=number,
        job=str(start.get("job") or ""),
        restart=int(start.get("restart") or 0),
        started=started,
        seen=max(started, float(worker.get("last_seen") or 0.0)),
        nodes=tuple(start.get("nodes") or ()),
        ended=float(end["ended"]) if "ended" in end else None,
        exit_code=end.get("exit_code"),
        following=str(end.get("next") or ""),
        verdict=verdict if verdict and (verdict.ended or started) >= started else None,
    )


def _verdict(path: Path) -> Verdict | None:
    values = read_json(path) or {}
    if "state" not in values:
        return None
    nodes = tuple(values.get("nodes") or ())
    source = str(values.get("source") or "")
    return Verdict(str(values["state"]), source, nodes, values.get("started"), values.get("ended"))
