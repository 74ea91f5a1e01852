"""Find and follow the logs that a user wants to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrate.errors import ConfigError, RunDirError
from orchestrate.launchers.attempts import attempt_numbers, job_file
from orchestrate.launchers.base import Launcher, Phase, job_folder, job_name
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.lease import lease_holder
from orchestrate.sweep.observe import observe
from orchestrate.sweep.record import TrialEntry, load_records, record_path
from orchestrate.sweep.standing import State, assess
from orchestrate.sweep.tail import follow, last_lines

ALL, JOB = "all", "job"


@dataclass(frozen=True)
class Log:
    """A log file: the attempt it is of, and its name among those of the attempt, such as the rank."""

    attempt: int
    name: str
    path: Path


class TrialLogs:
    """The logs of a trial that a person asked for.

    Args:
        runs: folder with `trials/`.
        trial: whose logs.
        stage: `pretrain` or `evaluate`.
        rank: a number, `all`, or `job` for what launcher and scheduler wrote.
        attempt: its number; 0 is the last, and those that follow it.

    Raises:
        ConfigError: there is no such rank.
        RunDirError: there is no such log; the message says which there are.
    """

    def __init__(self, runs: Path, trial: TrialEntry, *, stage: str, rank: str, attempt: int) -> None:
        if rank not in (ALL, JOB) and not rank.isdecimal():
            raise ConfigError(f"--rank {rank}: write the number of a rank, {ALL}, or {JOB} for the log of its job")
        self._name = job_name(trial.id, stage)
        self._folder = job_folder(runs / "trials", self._name)
        self._rank, self._attempt = rank, attempt
        self._read_up_to: dict[Path, int] = {}
        numbers = attempt_numbers(self._folder)
        if not numbers:
            never = "was never started" if stage == "pretrain" else "has no job that only evaluates"
            raise RunDirError(f"{trial.label}: {never}, so it has no log")
        # The last attempt may have begun a moment ago and have none yet.
        wanted = (attempt,) if attempt else tuple(reversed(numbers))
        self._first = next((number for number in wanted if self._logs_of(number)), 0)
        if not self._first:
            there = sorted(str(log.relative_to(self._folder.path)) for log in self._folder.path.glob("logs/**/*.log"))
            asked = self._folder.log_file(wanted[0], 0).with_name(f"rank-{rank}.log")
            raise RunDirError(f"{asked}: no such log; there are: {', '.join(there) or 'none'}")

    def last_lines(self, count: int) -> Iterator[str]:
        """Yield the end of each log; `follow` goes on from there."""
        logs = self._logs_of(self._first)
        self._read_up_to = {log.path: log.path.stat().st_size for log in logs}
        for log in logs:
            for line in last_lines(log.path, count, up_to=self._read_up_to[log.path]):
                yield self._told(log, line)

    def follow(
        self,
        launcher: Launcher,
        *,
        is_awaited: Callable[[], bool] = lambda: False,
        wait: Callable[[float], None] = time.sleep,
    ) -> Iterator[str]:
        """Yield what is added after `last_lines`, of new ranks and later attempts too, while the trial has a job.

        Args:
            launcher: knows its jobs.
            is_awaited: asked when it has none; tells whether another attempt is to come.
            wait: pauses between looks.
        """
        attempt, found = self._first, dict[Path, Log]()

        def find() -> list[Path]:
            found.update({log.path: log for log in self._logs_now()})
            return list(found)

        is_growing = liveness(launcher, self._name, is_awaited=(lambda: False) if self._attempt else is_awaited)
        for path, line in follow(find, read_up_to=self._read_up_to, is_growing=is_growing, wait=wait):
            if found[path].attempt > attempt:
                attempt = found[path].attempt
                yield f"--- attempt {attempt}"
            yield self._told(found[path], line)

    def _told(self, log: Log, line: str) -> str:
        return f"[{log.name}] {line}" if self._rank in (ALL, JOB) else line

    def _logs_now(self) -> Iterator[Log]:
        numbers = [self._first] if self._attempt else attempt_numbers(self._folder)
        for number in numbers:
            if number >= self._first:
                yield from self._logs_of(number)

    def _logs_of(self, attempt: int) -> list[Log]:
        folder = self._folder.log_file(attempt, 0).parent
        if self._rank == JOB:
            paths = [folder / "supervisor.log", folder / "srun.log", *_scheduler_logs(self._folder, attempt)]
            return [Log(attempt, path.stem, path) for path in paths if path.exists()]
        ranks = (path.stem.removeprefix("rank-") for path in folder.glob("rank-*.log"))
        chosen = sorted((rank for rank in ranks if self._rank in (ALL, rank)), key=int)
        return [Log(attempt, rank, folder / f"rank-{rank}.log") for rank in chosen]


def _scheduler_logs(folder: RunDir, attempt: int) -> list[Path]:
    """Return what the scheduler's script wrote; a job that runs several times has one file for all of its attempts."""
    job = (read_json(job_file(folder, attempt)) or {}).get("job")
    return [folder.path / "logs" / f"slurm-{job}.log"] if job else []


def liveness(
    launcher: Launcher,
    name: str,
    *,
    is_awaited: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], bool]:
    """Make a question whether a job writes or will, which bothers the launcher no more often than it bears."""
    asked, answer = -float("inf"), True

    def may_write() -> bool:
        nonlocal asked, answer
        if clock() - asked >= launcher.poll_seconds:
            state = launcher.poll([name]).get(name)
            # A launcher that cannot say is no sign of an end.
            answer = state is not None and (state.live or state.phase is Phase.UNKNOWN)
            answer = answer or is_awaited()
            asked = clock()
        return answer

    return may_write


def retries(runs: Path, trial: TrialEntry, launcher: Launcher, *, stage: str) -> Callable[[], bool]:
    """Make a question whether a trial without a job will get one: it is not over, and somebody controls a sweep of it.

    Args:
        runs: folder with `trials/` and `sweeps/`.
        trial: whose attempts.
        launcher: knows its jobs.
        stage: `pretrain` or `evaluate`.
    """
    records = [record for record in load_records(runs) if trial.id in record.trial_ids]
    evaluates = any(record.cluster_config().evaluate is not None for record in records)

    def is_due() -> bool:
        if not any(lease_holder(record_path(runs, record.name).parent) for record in records):
            return False
        place = assess(observe(runs, [trial.id], launcher, evaluates=evaluates)[trial.id])
        is_over = stage == "pretrain" and place.state is State.TRAINED and place.next_attempt is None
        return not place.state.final and not is_over

    return is_due
