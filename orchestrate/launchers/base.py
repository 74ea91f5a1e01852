"""What every launcher is: it starts copies of one worker, and answers for them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrate.errors import LaunchError
from orchestrate.runs import RunDir, read_json
from ssl_methods import plugins

if TYPE_CHECKING:
    from orchestrate.launchers.cluster import ClusterConfig

# Added to 128 when a process ends by a signal, as shells do: 137 is SIGKILL.
SIGNAL_BASE = 128


@dataclass(frozen=True)
class RunSpec:
    """One attempt at one trial: what a launcher is asked to start."""

    trial_id: str
    run_dir: Path
    attempt: int

    @property
    def name(self) -> str:
        """Job name, the same for every attempt of a trial."""
        return job_name(self.trial_id)


def job_name(trial_id: str) -> str:
    """Name the job of a trial; a lost job is found again by it."""
    return f"oc-{trial_id}"


def trial_of(name: str) -> str:
    """Return the id of the trial whose job has this name."""
    return name.removeprefix("oc-")


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a submission will do, before it does it.

    Attributes:
        name: job name.
        run_dir: absolute folder of the trial.
        attempt: number of the attempt, from 1.
        command: what each rank runs.
        environment: variables for every rank, added to those of the submitter.
        ranks: processes to start.
        cwd: absolute folder in which they start.
        stop_grace_seconds: time to save after a stop request, before SIGKILL; workers give up by themselves at 120.
        kill_grace_seconds: time between SIGTERM and SIGKILL when another rank has failed.
    """

    name: str
    run_dir: Path
    attempt: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ranks: int
    cwd: Path
    stop_grace_seconds: float = 150.0
    kill_grace_seconds: float = 5.0

    def render(self) -> str:
        """Write the plan as the shell commands that would do the same."""
        lines = [f"# {self.name}, attempt {self.attempt}: {self.ranks} ranks, logs in {self._logs()}"]
        lines += [f"cd {shlex.quote(str(self.cwd))}"]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in sorted(self.environment.items())]
        command = " ".join(shlex.quote(part) for part in self.command)
        lines += [f"RANK={rank} LOCAL_RANK={rank} {command} &" for rank in range(self.ranks)]
        return "\n".join([*lines, "wait"])

    def _logs(self) -> Path:
        return RunDir(self.run_dir).log_file(self.attempt, 0).parent

    def to_json(self) -> str:
        """Write the plan so that `from_json` reads an equal one."""
        values = asdict(self) | {"environment": dict(self.environment)}
        return json.dumps(values, default=str, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> LaunchPlan:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError: the text is not a plan.
        """
        values = json.loads(text)
        paths = {key: Path(values[key]) for key in ("run_dir", "cwd")}
        return LaunchPlan(**(values | paths | {"command": tuple(values["command"])}))


class Phase(StrEnum):
    """Where a job is. UNKNOWN means that the question failed; nothing may be concluded from it."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    LOST = "lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class JobState:
    """What a launcher knows of the latest job of a trial.

    Attributes:
        phase: where the job is.
        job: id that `cancel` and `logs` take.
        attempt: number of the attempt the job was started for.
        evidence: why the launcher says so, in words.
        exit_code: of the whole job, when FINISHED.
        ended: unix time, when FINISHED.
    """

    phase: Phase
    job: str
    attempt: int
    evidence: str
    exit_code: int | None = None
    ended: float | None = None

    @property
    def live(self) -> bool:
        """Whether processes exist or will exist."""
        return self.phase in (Phase.QUEUED, Phase.RUNNING)


class Launcher(Protocol):
    """Start, find, stop and read jobs on one kind of place."""

    def plan(self, spec: RunSpec) -> LaunchPlan:
        """Decide everything about a submission, doing nothing."""

    def problems(self) -> tuple[str, ...]:
        """Say what the place lacks to run trials as its config asks."""

    def warnings(self, *, parallel: int) -> tuple[str, ...]:
        """Say what will make trials slow, so many at once, but not stop them."""

    def submit(self, plan: LaunchPlan) -> str:
        """Start a job and return its id.

        Raises:
            JobExistsError: a job of the same trial is live, or has used this attempt number.
            LaunchError: it could not be started.
        """

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name; names never submitted are left out."""

    def cancel(self, jobs: Iterable[str]) -> None:
        """Ask jobs to save and stop; those that have ended already are left alone."""

    def logs(self, job: str) -> tuple[Path, ...]:
        """Return the log files of a job, rank 0 first."""


class JobExistsError(LaunchError):
    """Say that the trial has a live job already: ask again who, do not start another."""


@dataclass(frozen=True)
class AttemptRecord:
    """What the files say about one attempt, whoever launched it.

    Attributes:
        number: from 1.
        started, ended: unix times; `ended` is the last sign of life if the end was not recorded.
        ranks: processes started.
        exit_code: of the job; None while it runs, or if it was lost.
        failed_rank: rank whose end decided the exit code.
        stopped_by: signal that asked the job to stop, such as SIGTERM.
        checkpoint_before: step of the checkpoint that was there when it started.
        first_step, last_step: optimizer steps it began and was last seen at; None if training never began.
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

    @property
    def seconds(self) -> float:
        """Wall-clock time from the start of the job to its end."""
        return max(0.0, self.ended - self.started)

    @property
    def rank_seconds(self) -> float:
        """Time of all ranks together, wasted or not."""
        return self.seconds * self.ranks


def jobs_folder(run: RunDir) -> Path:
    """Folder in which whatever keeps a trial's jobs leaves its records."""
    return run.path / "jobs"


def job_file(run: RunDir, attempt: int) -> Path:
    """Record of the start of an attempt's job; written by whatever keeps the job."""
    return jobs_folder(run) / f"{attempt}.start.json"


def exit_file(run: RunDir, attempt: int) -> Path:
    """Record of the end of an attempt's job; written by whatever kept it."""
    return jobs_folder(run) / f"{attempt}.end.json"


def job_numbers(run: RunDir) -> list[int]:
    """List the attempts that have a job, in order."""
    return sorted(int(path.name.partition(".")[0]) for path in jobs_folder(run).glob("[0-9]*.start.json"))


def attempt_numbers(run: RunDir) -> list[int]:
    """List the attempts that were started, in order; a worker started by hand counts."""
    by_hand = (int(path.stem) for path in run.attempts.glob("[0-9]*.json") if path.stem.isdigit())
    return sorted({*job_numbers(run), *by_hand})


def checkpoint_step(run: RunDir) -> int:
    """Return the optimizer step of the newest checkpoint, 0 without one."""
    steps = (path.name.rpartition("-")[2] for path in run.checkpoints.glob("step-*"))
    return max((int(step) for step in steps if step.isdigit()), default=0)


def load_attempts(run: RunDir) -> tuple[AttemptRecord, ...]:
    """Read every attempt of a trial, in order."""
    return tuple(_load_attempt(run, number) for number in attempt_numbers(run))


def _load_attempt(run: RunDir, number: int) -> AttemptRecord:
    job: dict[str, Any] = read_json(job_file(run, number)) or {}
    end: dict[str, Any] = read_json(exit_file(run, number)) or {}
    worker: dict[str, Any] = read_json(run.attempt_file(number)) or {}
    if not job:
        end = {"exit_code": worker.get("exit_code")}
    started = float(job.get("started") or worker.get("started") or worker.get("last_seen") or 0.0)
    return AttemptRecord(
        number=number,
        started=started,
        ended=float(end.get("ended") or worker.get("last_seen") or started),
        ranks=int(job.get("ranks") or worker.get("world_size") or 0),
        exit_code=end.get("exit_code"),
        failed_rank=end.get("failed_rank"),
        stopped_by=end.get("stopped_by"),
        checkpoint_before=int(job.get("checkpoint_step") or worker.get("first_step") or 0),
        first_step=worker.get("first_step"),
        last_step=worker.get("last_step"),
    )


def load_launcher(cluster: ClusterConfig, runs: Path) -> Launcher:
    """Build the launcher that a cluster config names, from the file of that name.

    Args:
        cluster: where to run.
        runs: folder that holds `trials/`.

    Raises:
        LaunchError: there is no such file, or no launcher in it.
    """
    try:
        launcher: Launcher = plugins.load("orchestrate.launchers", cluster.launcher)(cluster, runs)
    except (ValueError, TypeError) as error:
        raise LaunchError(f"launcher: {error}") from error
    return launcher
