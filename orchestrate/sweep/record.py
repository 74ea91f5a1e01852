"""sweep.json: what a sweep was asked to be, written beside its results so that nothing else is needed to go on."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orchestrate
from orchestrate.errors import RunDirError
from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.runs import read_json, write_json

if TYPE_CHECKING:
    from orchestrate.config.load import Document
    from orchestrate.sweep.config import SweepConfig
    from orchestrate.sweep.space import Trial


@dataclass(frozen=True)
class TrialEntry:
    """One trial of a sweep.

    Attributes:
        id: fingerprint of the config.
        assignment: value of each axis.
        config: the resolved RunConfig as plain values.
        total_steps: optimizer steps of the whole budget.
    """

    id: str
    assignment: dict[str, Any]
    config: dict[str, Any]
    total_steps: int = 0

    @property
    def label(self) -> str:
        """Name the trial for people: its short id and what sets it apart."""
        axes = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.assignment.items())
        return f"{self.id[:8]} {axes}".strip()

    @property
    def total_images(self) -> int:
        """Images that the whole budget consumes."""
        return self.total_steps * int(self.config["train"]["global_batch"])


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as sweep.json holds it.

    Attributes:
        name, file, sha: of the sweep file; `sha` is the SHA-256 of its text.
        sweep_yaml, cluster_yaml: the files as they were.
        cluster: the resolved ClusterConfig.
        limits, objective: of the sweep; `objective` has metric and goal.
        command: what the user typed.
        commit, dirty: of the git checkout that the code comes from, if it is one.
        created: unix time of the command.
        trials: in order.
        removed: trials that an earlier version of the sweep had; their RunDirs are kept.
    """

    name: str
    file: str
    sha: str
    sweep_yaml: str
    cluster_yaml: str
    cluster: dict[str, Any]
    limits: dict[str, Any]
    objective: dict[str, Any]
    command: tuple[str, ...]
    commit: str | None
    dirty: bool
    created: float
    trials: tuple[TrialEntry, ...]
    removed: tuple[TrialEntry, ...] = ()

    @property
    def trial_ids(self) -> tuple[str, ...]:
        """Ids of the trials, in order."""
        return tuple(trial.id for trial in self.trials)

    @property
    def parallel(self) -> int:
        """Most trials at once: the smaller of what the sweep and the cluster allow."""
        cluster = int(self.cluster["limits"]["parallel"])
        return min(cluster, int(self.limits["parallel"]) or cluster)

    @property
    def ranks(self) -> int:
        """Worker processes of one trial."""
        return self.cluster_config().resources.ranks

    def cluster_config(self) -> ClusterConfig:
        """Return where the sweep runs."""
        return ClusterConfig.model_validate(self.cluster)

    def with_cluster(self, cluster: ClusterConfig, cluster_yaml: str) -> SweepRecord:
        """Return the same sweep at another place."""
        return replace(self, cluster=cluster.model_dump(mode="json"), cluster_yaml=cluster_yaml)

    def only(self, trial_ids: Iterable[str]) -> SweepRecord:
        """Return the same sweep reduced to some of its trials, removed ones included."""
        wanted = set(trial_ids)
        trials = tuple(trial for trial in (*self.trials, *self.removed) if trial.id in wanted)
        return replace(self, trials=trials, removed=())

    def following(self, before: SweepRecord | None) -> SweepRecord:
        """Return this record as the next version of an earlier one, whose other trials become the removed ones."""
        if before is None:
            return self
        kept = set(self.trial_ids)
        removed = {
            trial.id: trial for trial in (*before.removed, *before.trials, *self.removed) if trial.id not in kept
        }
        return replace(self, removed=tuple(removed.values()))

    def wants_the_same(self, other: SweepRecord) -> bool:
        """Tell whether both ask for the same, whoever typed what, when and at which commit."""
        origin = {key: getattr(other, key) for key in ("command", "created", "commit", "dirty")}
        return replace(self, **origin) == other


def build_record(
    sweep: SweepConfig,
    document: Document,
    trials: Sequence[Trial],
    *,
    cluster: ClusterConfig,
    cluster_yaml: str,
    command: Sequence[str],
) -> SweepRecord:
    """Put together what sweep.json will hold; asks git about the code, writes nothing."""
    commit, dirty = git_state(Path(orchestrate.__file__).parent)
    return SweepRecord(
        name=sweep.name,
        file=str(document.path),
        sha=hashlib.sha256(document.text.encode()).hexdigest(),
        sweep_yaml=document.text,
        cluster_yaml=cluster_yaml,
        cluster=cluster.model_dump(mode="json"),
        limits=sweep.limits.model_dump(mode="json"),
        objective=_objective(sweep, trials),
        command=tuple(command),
        commit=commit,
        dirty=dirty,
        created=time.time(),
        trials=tuple(
            TrialEntry(trial.id, dict(trial.assignment), trial.config.model_dump(mode="json"), trial.total_steps)
            for trial in trials
        ),
    )


def _objective(sweep: SweepConfig, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the stated objective, else the first probe's top-1 accuracy."""
    if sweep.objective is not None:
        return sweep.objective.model_dump(mode="json")
    probes = trials[0].config.probes if trials else ()
    return {"metric": f"{probes[0].name}.top1" if probes else "loss", "goal": "max" if probes else "min"}


def git_state(package: Path) -> tuple[str | None, bool]:
    """Return the commit that a Python package is checked out at and whether files of the checkout differ from it.

    A package that git does not track, as one installed in a virtual environment of another project, has (None, False).
    """

    def ask(*words: str) -> str | None:
        try:
            command = ("git", "-c", "safe.directory=*", *words)  # also of a checkout of another user
            answer = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    is_tracked = ask("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = ask("rev-parse", "HEAD") if is_tracked else None
    return (commit, bool(ask("status", "--porcelain", "--untracked-files=no"))) if commit else (None, False)


def counted(number: int, noun: str) -> str:
    """Write a number of things: `1 trial`, `2 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def record_path(runs: Path, name: str) -> Path:
    """Return where the record of a sweep lies."""
    return runs / "sweeps" / name / "sweep.json"


def save_record(runs: Path, record: SweepRecord) -> None:
    """Write sweep.json in one step."""
    write_json(record_path(runs, record.name), asdict(record))


def load_record(runs: Path, name: str) -> SweepRecord:
    """Read the record of a sweep.

    Raises:
        RunDirError: there is none, or it is damaged.
    """
    path = record_path(runs, name)
    values = read_json(path)
    if values is None:
        state = "is damaged" if path.exists() else "does not exist"
        raise RunDirError(f"{path}: {state}; `orchestrate sweep` writes it")
    return _parse(values, path)


def _parse(values: Mapping[str, Any], path: Path) -> SweepRecord:
    try:
        trials = tuple(TrialEntry(**trial) for trial in values["trials"])
        removed = tuple(TrialEntry(**trial) for trial in values["removed"])
        known = {key: values[key] for key in (field.name for field in fields(SweepRecord))}
    except (KeyError, TypeError) as error:
        raise RunDirError(f"{path}: damaged ({error}); run `orchestrate sweep` again, which writes it") from error
    return SweepRecord(**(known | {"trials": trials, "removed": removed, "command": tuple(known["command"])}))


def find_record(runs: Path, name: str) -> SweepRecord | None:
    """Read the record of a sweep, or return None if there is none."""
    return load_record(runs, name) if record_path(runs, name).exists() else None


def sweep_names(runs: Path) -> list[str]:
    """List the sweeps of a runs folder."""
    return sorted(path.parent.name for path in runs.glob("sweeps/*/sweep.json"))


def load_records(runs: Path) -> list[SweepRecord]:
    """Read every sweep of a runs folder."""
    return [load_record(runs, name) for name in sweep_names(runs)]
