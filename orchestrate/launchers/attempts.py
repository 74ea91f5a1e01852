"""What the files of a trial say about its attempts, whoever launched them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.launchers.base import Verdict
from orchestrate.runs import RunDir, read_json

# Time before the end of a job at which its workers save, where its record does not say.
DEFAULT_LEAD_SECONDS = 120.0
_START, _END, _VERDICT = ".start.json", ".end.json", ".verdict.json"


@dataclass(frozen=True)
class AttemptRecord:
    """What the files say about one attempt, whoever launched it.

    Attributes:
        number: from 1.
        started, ended: unix times; `ended` is the last sign of life if the end was not recorded.
        ranks: processes started; 0 for an attempt that a scheduler dropped before it began.
        exit_code: of the job; None while it runs, or if it was lost.
        failed_rank: rank whose end decided the exit code.
        stopped_by: signal that asked the job to stop, such as SIGTERM.
        checkpoint_before: step of the checkpoint that was there when it started.
        first_step, last_step: optimizer steps it began and was last seen at; None if training never began.
        job: the scheduler's id of its job; empty without a scheduler.
        nodes: hosts of its ranks.
        submitted, ends: unix times at which it was queued, and at which its time limit ends; None if unknown.
        lead_seconds: time before `ends` at which it was to save.
        hint: cause, as whatever kept the job found it in what the job left behind; empty if it found none.
        blamed: nodes that whatever kept the job suspects.
        evidence: what was found, in words.
        following: what whatever kept the job did for its continuation, such as `job 124 goes on`.
        stop_reason: what made the worker save and stop, such as SIGUSR1, `deadline` or `stop file`; empty if nothing.
        error, traceback: of the rank that failed first: its error in a line, and a hash of where it came from.
        startup_seconds, train_seconds: time to the first step, and time in steps; None if unknown.
        verdict: what the scheduler said of its end.
        asked_to_end: whether we asked the scheduler for that end.
    """

    number: int
    started: float
    ended: float
    ranks: int
    exit_code: int | None
    failed_rank: int | None = None
    stopped_by: str | None = None
    checkpoint_before: int = 0
    first_step: int | None = None
    last_step: int | None = None
    job: str = ""
    nodes: tuple[str, ...] = ()
    submitted: float | None = None
    ends: float | None = None
    lead_seconds: float = DEFAULT_LEAD_SECONDS
    hint: str = ""
    blamed: tuple[str, ...] = ()
    evidence: str = ""
    following: str = ""
    stop_reason: str = ""
    error: str = ""
    traceback: str = ""
    startup_seconds: float | None = None
    train_seconds: float | None = None
    verdict: Verdict | None = None
    asked_to_end: bool = False

    @property
    def seconds(self) -> float:
        """Wall-clock time from the start of the job to its end."""
        return max(0.0, self.ended - self.started)

    @property
    def rank_seconds(self) -> float:
        """Time of all ranks together, wasted or not."""
        return self.seconds * self.ranks

    @property
    def queue_seconds(self) -> float:
        """Time from the submission to the start; no rank existed in it."""
        return max(0.0, self.started - self.submitted) if self.submitted else 0.0

    @property
    def has_begun(self) -> bool:
        """Whether a process of it ever ran."""
        return self.ranks > 0


def jobs_folder(run: RunDir) -> Path:
    """Folder in which whatever keeps a trial's jobs leaves its records."""
    return run.path / "jobs"


def job_file(run: RunDir, attempt: int) -> Path:
    """Record of the start of an attempt's job; written by whatever keeps the job."""
    return jobs_folder(run) / f"{attempt}{_START}"


def exit_file(run: RunDir, attempt: int) -> Path:
    """Record of the end of an attempt's job; written by whatever kept it."""
    return jobs_folder(run) / f"{attempt}{_END}"


def verdict_file(run: RunDir, attempt: int) -> Path:
    """Record of what the scheduler said of the end of an attempt; written by the controller."""
    return jobs_folder(run) / f"{attempt}{_VERDICT}"


def submission_file(run: RunDir) -> Path:
    """Record of the last job that was submitted to a scheduler, with its id and the time; written by the launcher."""
    return jobs_folder(run) / "submitted.json"


def job_numbers(run: RunDir) -> list[int]:
    """List the attempts that have a job, in order."""
    return sorted(_numbers(_names(jobs_folder(run)), _START))


@dataclass(frozen=True)
class Numbers:
    """The numbers of the attempts of a folder: those that have a job, those that are used, those with a verdict."""

    jobs: tuple[int, ...]
    used: tuple[int, ...]
    judged: frozenset[int]


def list_numbers(run: RunDir) -> Numbers:
    """List all numbers at once, which matters where there are thousands of folders."""
    records = _names(jobs_folder(run))
    judged = frozenset(_numbers(records, _VERDICT)) if records else frozenset()
    return Numbers(tuple(sorted(_numbers(records, _START))), tuple(_used(records, _names(run.attempts))), judged)


def attempt_numbers(run: RunDir) -> list[int]:
    """List the attempts whose numbers are used, in order.

    One that a scheduler dropped before it began counts, and so does a worker that was started by hand.
    """
    return _used(_names(jobs_folder(run)), _names(run.attempts))


def checkpoint_step(run: RunDir) -> int:
    """Return the optimizer step of the newest checkpoint, 0 without one."""
    steps = (name.rpartition("-")[2] for name in _names(run.checkpoints) if name.startswith("step-"))
    return max((int(step) for step in steps if step.isdigit()), default=0)


def load_attempts(run: RunDir) -> tuple[AttemptRecord, ...]:
    """Read every attempt of a trial, in order; files that are not there are not asked for."""
    records = _names(jobs_folder(run))
    workers = _names(run.attempts)
    return tuple(_load_attempt(run, number, records | workers) for number in _used(records, workers))


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (a Path for each of thousands of names costs more than the call)
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _numbers(names: set[str], ending: str) -> Iterator[int]:
    stems = (name.removesuffix(ending) for name in names if name.endswith(ending))
    return (int(stem) for stem in stems if stem.isdigit())


def _used(records: set[str], workers: set[str]) -> list[int]:
    kept = {*_numbers(records, _START), *_numbers(records, _VERDICT)}
    return sorted({*kept, *_numbers(workers, ".json")})


def _load_attempt(run: RunDir, number: int, there: set[str]) -> AttemptRecord:
    def read(folder: Path, name: str) -> dict[str, Any]:
        return (read_json(folder / name) or {}) if name in there else {}

    kept = jobs_folder(run)
    job, end = read(kept, f"{number}{_START}"), read(kept, f"{number}{_END}")
    worker, verdict = read(run.attempts, f"{number}.json"), read(kept, f"{number}{_VERDICT}")
    if not job:
        end = {"exit_code": worker.get("exit_code")}
    failed_rank = end.get("failed_rank")
    failure = _failure(run, number, failed_rank) if str(number) in there else {}
    started = float(job.get("started") or worker.get("started") or worker.get("last_seen") or 0.0)
    if not job and not worker:
        started = float(verdict.get("ended") or 0.0)
    return AttemptRecord(
        number=number,
        started=started,
        ended=float(end.get("ended") or worker.get("last_seen") or started),
        ranks=int(job.get("ranks") or worker.get("world_size") or 0),
        exit_code=end.get("exit_code"),
        failed_rank=failed_rank,
        stopped_by=end.get("stopped_by"),
        checkpoint_before=int(job.get("checkpoint_step") or worker.get("first_step") or 0),
        first_step=worker.get("first_step"),
        last_step=worker.get("last_step"),
        job=str(job.get("job") or ""),
        nodes=tuple(job.get("nodes") or ()),
        submitted=job.get("submitted"),
        ends=job.get("ends"),
        lead_seconds=float(job.get("lead_seconds") or DEFAULT_LEAD_SECONDS),
        hint=str(end.get("hint") or ""),
        blamed=tuple(end.get("blamed") or ()),
        evidence=str(end.get("evidence") or ""),
        following=str(end.get("next") or ""),
        stop_reason=str(worker.get("stop_reason") or ""),
        error=str(failure.get("error") or ""),
        traceback=str(failure.get("traceback") or ""),
        startup_seconds=_total(worker.get("startup_seconds")),
        train_seconds=_total(worker.get("train_seconds")),
        verdict=_verdict(verdict, started=started),
        asked_to_end=bool(verdict.get("asked")),
    )


def _total(seconds: Any) -> float | None:
    """Return a time that may be told part by part."""
    if isinstance(seconds, Mapping):
        return float(sum(seconds.values()))
    return None if seconds is None else float(seconds)


def _verdict(values: Mapping[str, Any], *, started: float) -> Verdict | None:
    """Read a verdict, unless it is about an end before the attempt began: of a job that had its number before."""
    ended = values.get("ended")
    if "state" not in values or (ended is not None and ended < started):
        return None
    nodes = tuple(values.get("nodes") or ())
    return Verdict(str(values["state"]), str(values.get("source") or ""), nodes, values.get("started"), ended)


def _failure(run: RunDir, number: int, failed_rank: int | None) -> dict[str, Any]:
    """Read what the rank left that decided the end; else what the first rank to fail left."""
    folder = run.attempts / str(number)
    if failed_rank is not None and (own := read_json(folder / f"rank-{failed_rank}.json")):
        return own
    records = [record for name in sorted(_names(folder)) if (record := read_json(folder / name))]
    return min(records, key=lambda record: float(record.get("time") or 0.0), default={})
