"""What every launcher is: it starts copies of one worker, and answers for them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrate.errors import LaunchError
from orchestrate.runs import RunDir
from ssl_methods import plugins

if TYPE_CHECKING:
    from orchestrate.launchers.cluster import ClusterConfig

# What a job does for a trial; the job of a later stage has a folder of its own inside the RunDir.
STAGES = ("pretrain", "evaluate")
_PREFIX, _EVALUATE = "oc-", "-evaluate"


@dataclass(frozen=True)
class RunSpec:
    """One attempt at one trial: what a launcher is asked to start.

    Attributes:
        trial_id: fingerprint of the trial.
        run_dir: RunDir of the trial, whatever the stage.
        attempt: number, from 1; what keeps the job takes the next free one.
        stage: one of STAGES.
        exclude: nodes that the job must not get.
        code: folder whose code the job runs, or None for that of the checkout.
        sweep: name of the sweep that asks, for people who look at the queue.
    """

    trial_id: str
    run_dir: Path
    attempt: int
    stage: str = "pretrain"
    exclude: tuple[str, ...] = ()
    code: Path | None = None
    sweep: str = ""

    @property
    def name(self) -> str:
        """Job name, the same for every attempt of a stage of a trial."""
        return job_name(self.trial_id, self.stage)

    @property
    def folder(self) -> RunDir:
        """Absolute folder in which the job leaves its records and logs."""
        return _stage_folder(RunDir(self.run_dir.absolute()), self.stage)


def job_name(trial_id: str, stage: str = "pretrain") -> str:
    """Name the job of a stage of a trial; a lost job is found again by it."""
    return f"{_PREFIX}{trial_id}{_EVALUATE if stage == 'evaluate' else ''}"


def trial_of(name: str) -> str:
    """Return the id of the trial whose job has this name."""
    return name.removeprefix(_PREFIX).removesuffix(_EVALUATE)


def stage_of(name: str) -> str:
    """Return the stage whose job has this name."""
    return "evaluate" if name.endswith(_EVALUATE) else "pretrain"


def is_job_name(name: str) -> bool:
    """Tell whether a job of this name may be one of ours."""
    return name.startswith(_PREFIX)


def job_folder(trials: Path, name: str) -> RunDir:
    """Return the folder of a job's records and logs: the RunDir, or for a later stage a RunDir-like folder in it."""
    return _stage_folder(RunDir(trials / trial_of(name)), stage_of(name))


def _stage_folder(run: RunDir, stage: str) -> RunDir:
    return run.evaluation if stage == "evaluate" else run


def code_environment(spec: RunSpec, cwd: Path, *, python_path: str | None = None) -> dict[str, str]:
    """Return the variables that make Python take the code of `spec.code`; none if the job runs the checkout's.

    Args:
        spec: what is started.
        cwd: folder in which it starts; modules of the user's own lie there.
        python_path: folders that are searched last; those of this process if None.
    """
    if spec.code is None:
        return {}
    last = os.environ.get("PYTHONPATH", "") if python_path is None else python_path
    folders = [str(spec.code.absolute()), str(cwd), *filter(None, last.split(os.pathsep))]
    # Without PYTHONSAFEPATH `python -m` would look into the current folder, the checkout, before all others.
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), "PYTHONSAFEPATH": "1"}


def worker_environment(cluster: ClusterConfig, spec: RunSpec, cwd: Path) -> dict[str, str]:
    """Return the variables of every rank that do not depend on the launcher, the user's own last."""
    resources = cluster.stage_resources(spec.stage)
    environment = {
        "ORCHESTRATE_DEVICE": resources.device,
        "ORCHESTRATE_STAGE": spec.stage if cluster.evaluate else "all",
        "OMP_NUM_THREADS": str(resources.cpus_per_rank),
        "PYTHONUNBUFFERED": "1",
    }
    if resources.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    own = dict(cluster.environment)
    return environment | own | code_environment(spec, cwd, python_path=own.get("PYTHONPATH"))


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a submission will do, before it does it.

    Attributes:
        name: job name.
        run_dir: absolute folder of the job's records and logs: the RunDir, or that of a later stage in it.
        attempt: number of the attempt, from 1.
        command: what each rank runs.
        environment: variables for every rank, added to those of the submitter.
        ranks: processes to start, on all nodes together.
        cwd: absolute folder in which they start.
        stop_grace_seconds: time to save after a stop request, before SIGKILL; workers give up by themselves at 120.
        kill_grace_seconds: time between SIGTERM and SIGKILL when another rank has failed.
        stage: what the job does for the trial.
        nodes: hosts over which the ranks are spread.
        script: text that a scheduler gets; empty where the launcher starts the ranks itself.
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
    stage: str = "pretrain"
    nodes: int = 1
    script: str = ""

    def render(self) -> str:
        """Return what the scheduler gets, or write the plan as the shell commands that would do the same."""
        if self.script:
            return self.script
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
class Verdict:
    """What a scheduler says of the end of an attempt.

    Attributes:
        state: its word in capitals, such as NODE_FAIL, without what follows it.
        source: where the word was read, such as `squeue`.
        nodes: on which the attempt ran, as far as the scheduler says.
        started, ended: unix times.
    """

    state: str
    source: str
    nodes: tuple[str, ...] = ()
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class JobState:
    """What a launcher knows of the latest job of a trial.

    Attributes:
        phase: where the job is.
        job: id that `cancel`, `release` and `logs` take.
        attempt: number of the attempt the job was started for; of a queued job the one that it will take.
        evidence: why the launcher says so, in words.
        exit_code: of the whole job, when FINISHED; None if nobody recorded it.
        ended: unix time, when FINISHED.
        held: queued, and only waiting for what `release` ends, such as a begin time that a requeue has set.
        hold: queued, and waiting for a person who has to type this command; empty if it waits for no one.
        given_up: with `hold`: its nodes failed to start it again and again, so somebody should see why first.
        verdicts: what the scheduler says of attempts that ended, by their numbers; not of all.
        nodes: where the job runs.
    """

    phase: Phase
    job: str
    attempt: int
    evidence: str
    exit_code: int | None = None
    ended: float | None = None
    held: bool = False
    hold: str = ""
    given_up: bool = False
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        """Whether processes exist or will exist."""
        return self.phase in (Phase.QUEUED, Phase.RUNNING)


class Launcher(Protocol):
    """Start, find, stop and read jobs on one kind of place."""

    @property
    def poll_seconds(self) -> float:
        """Time between two questions that the place bears."""

    @property
    def array_size(self) -> int:
        """Most jobs that `submit_array` takes at once; 0 if there are no arrays."""

    def plan(self, spec: RunSpec) -> LaunchPlan:
        """Decide everything about a submission, doing nothing."""

    def problems(self) -> tuple[str, ...]:
        """Say what the place lacks to run trials as its config asks."""

    def warnings(self, *, parallel: int) -> tuple[str, ...]:
        """Say what will make trials slow, so many at once, but not stop them."""

    def judge(self, plan: LaunchPlan) -> str:
        """Return what the scheduler would say to a submission; empty where there is none."""

    def submit(self, plan: LaunchPlan) -> str:
        """Start a job and return its id.

        Raises:
            JobExistsError: a job of the same trial is live, or has used this attempt number.
            TryLaterError: the place does not answer, or takes no more jobs now.
            LaunchError: it could not be started.
        """

    def submit_array(self, plans: Sequence[LaunchPlan]) -> list[str]:
        """Start up to `array_size` jobs of the same shape with one request, and return their ids.

        Raises:
            TryLaterError, LaunchError: none of them was started; see `submit`.
        """

    def remarks(self) -> tuple[str, ...]:
        """Say what a person should know about the submissions since the last call."""

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name; names never submitted are left out."""

    def release(self, jobs: Iterable[str]) -> None:
        """Start jobs that are `held` as soon as there is room; others are left alone."""

    def cancel(self, jobs: Iterable[str]) -> None:
        """Ask jobs to save and stop, with no successor; those that have ended already are left alone.

        Raises:
            TryLaterError: the place does not answer; perhaps nothing was stopped.
        """

    def logs(self, job: str) -> tuple[Path, ...]:
        """Return the log files of a job, rank 0 first."""


class JobExistsError(LaunchError):
    """Say that the trial has a live job already: ask again who, do not start another."""


class TryLaterError(LaunchError):
    """Say that the place cannot take a request now: it does not answer, or (`full`) a limit on jobs is reached."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


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
