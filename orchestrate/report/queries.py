"""What the files of a sweep say: typed, frozen rows; nothing here draws or averages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrate.errors import RunDirError
from orchestrate.exits import SIGNAL_BASE, Exit
from orchestrate.launchers.attempts import AttemptRecord, job_file, load_attempts
from orchestrate.launchers.base import Phase
from orchestrate.launchers.supervisor import sign_of_life
from orchestrate.runs import RunDir, read_json
from orchestrate.score_files import checkpoint_scores

NOT_STARTED, INTERRUPTED, UNREADABLE = "not started", "interrupted", "unreadable"
# The order in which states are told: what is finished, what is under way, what is over, what never began.
STATES = (
    "done", "evaluating", "training", "starting", INTERRUPTED, "stopped", "diverged", "failed", "cancelled", UNREADABLE,
    NOT_STARTED,
)  # fmt: skip
# What exit codes of a job say of its trial; signals interrupt it, anything else is its failure.
_EXITS = {0: INTERRUPTED, Exit.HANG: INTERRUPTED, Exit.PREFLIGHT: INTERRUPTED, Exit.PEER_LOST: INTERRUPTED}
_EXITS |= {Exit.CONTINUE: "stopped", Exit.DIVERGED: "diverged"}
CLOSED = frozenset({"done", "diverged", "failed", "cancelled"})  # no more results will come


@dataclass(frozen=True)
class Objective:
    """The metric that ranks trials, as `<probe key>.<name>`; goal is `max` or `min`."""

    metric: str
    goal: str


@dataclass(frozen=True)
class CheckpointRow:
    """What a checkpoint of a trial scored."""

    step: int
    images: int
    epochs: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep as its RunDir shows it; None where the RunDir does not say.

    `metrics` is empty unless the trial is done. `train_seconds` is the wall-clock of the optimizer steps, each counted
    once; `rank_seconds` is that times the ranks. `spent_seconds` and `spent_rank_seconds` are of all attempts from
    start to end, as `orchestrate status` counts them: starting up, steps made twice, probes, lost attempts too.
    `checkpoints` are those that were scored, in order; `commit` is that of the frozen code the trial ran.
    """

    id: str
    assignment: Mapping[str, Any]
    config: Mapping[str, Any]
    state: str
    note: str = ""
    step: int | None = None
    total_steps: int | None = None
    images: int | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    rank_seconds: float | None = None
    spent_seconds: float = 0.0
    spent_rank_seconds: float = 0.0
    world_size: int | None = None
    device: str | None = None
    num_attempts: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    checkpoints: tuple[CheckpointRow, ...] = ()
    commit: str | None = None
    is_dirty: bool = False

    @property
    def method(self) -> str:
        """Name the method."""
        return str(self.config["method"]["name"])

    @property
    def embed_dim(self) -> int | None:
        """Give the method's embedding dimension, None for a method without that parameter."""
        value = self.config["method"].get("embed_dim")
        return None if value is None else int(value)

    @property
    def budget(self) -> str:
        """Give the training budget with its unit, as in `20ep`."""
        return str(self.config["train"]["budget"])

    @property
    def seed(self) -> int:
        """Give the training seed."""
        return int(self.config["train"]["seed"])

    @property
    def backbone(self) -> str:
        """Name the backbone."""
        return str(self.config["backbone"]["name"])

    @property
    def is_done(self) -> bool:
        """Tell whether the trial has results."""
        return self.state == "done"


@dataclass(frozen=True)
class Sweep:
    """One sweep and its trials, in the order of sweep.json."""

    name: str
    file: str
    sweep_yaml: str
    cluster_yaml: str
    command: tuple[str, ...]
    commit: str | None
    is_dirty: bool
    created: float | None
    objective: Objective
    trials: tuple[TrialRow, ...]


def load_sweep(sweep_dir: Path, trials_dir: Path) -> Sweep:
    """Read sweep.json and what every RunDir of its trials has to say.

    Raises:
        RunDirError: sweep.json is missing, damaged or lacks a key. A trial's own files never raise: a trial without
            a RunDir is `not started`, one with damaged files is `unreadable`.
    """
    path = sweep_dir / "sweep.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return _sweep(entry, trials_dir)
    except FileNotFoundError:
        raise RunDirError(f"{path}: no such file; start the sweep first with `orchestrate sweep`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path}: not a sweep ({error!r}); run `orchestrate sweep` again to write it") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into dotted keys: `{"train": {"seed": 0}}` into `{"train.seed": 0}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def metric_names(trials: tuple[TrialRow, ...], objective: Objective) -> tuple[str, ...]:
    """List the metrics of trained encoders: the objective first, then the others by name."""
    found = {name for trial in trials for name in trial.metrics if "/" not in name}
    return (objective.metric, *sorted(found - {objective.metric}))


def sample_losses(run: RunDir, *, max_points: int = 150) -> tuple[tuple[float, float], ...]:
    """Read (epoch, loss) pairs of metrics.jsonl, at most `max_points` spread over the file; finite ones only.

    Seeks instead of reading the whole file, so that a run of a million steps costs as little as one of a hundred.
    """
    if not run.metrics_file.is_file():
        return ()
    by_step = {line["step"]: line for line in _sample_lines(run.metrics_file, max_points) if _is_loss(line)}
    return tuple((float(line["epoch"]), float(line["loss"])) for _, line in sorted(by_step.items()))


def _sweep(entry: dict[str, Any], trials_dir: Path) -> Sweep:
    trials = tuple(_trial(trial, RunDir(trials_dir / str(trial["id"]))) for trial in entry["trials"])
    metric = _resolve_metric(str(entry["objective"]["metric"]), trials)
    return Sweep(
        name=str(entry["name"]),
        file=str(entry.get("file", "")),
        sweep_yaml=str(entry.get("sweep_yaml") or ""),
        cluster_yaml=str(entry.get("cluster_yaml") or ""),
        command=tuple(str(word) for word in entry.get("command") or ()),
        commit=entry.get("commit"),
        is_dirty=bool(entry.get("dirty", False)),
        created=entry.get("created"),
        objective=Objective(metric, str(entry["objective"].get("goal", "max"))),
        trials=trials,
    )


def _resolve_metric(metric: str, trials: tuple[TrialRow, ...]) -> str:
    """Find the key that was measured for an objective by its probe's name: `knn_k20_cosine.top1` for `knn.top1`.

    An objective that was measured under its own name, under none, or under several protocols stays as it is.
    """
    measured = {name for trial in trials for name in trial.metrics if "/" not in name}
    probe, _, number = metric.rpartition(".")
    fitting = {key for key in measured if key.startswith(f"{probe}_") and key.rpartition(".")[2] == number}
    return fitting.pop() if metric not in measured and probe and len(fitting) == 1 else metric


def _trial(entry: dict[str, Any], run: RunDir) -> TrialRow:
    assignment, total_steps = entry.get("assignment") or {}, entry.get("total_steps") or None
    row = TrialRow(str(entry["id"]), assignment, entry["config"], state="", total_steps=total_steps)
    row.method, row.embed_dim, row.budget, row.seed, row.backbone  # noqa: B018  fail here, where sweep.json is named
    try:
        return replace(_observe(row, run), checkpoints=_checkpoints(run), **_code(run))
    except (ValueError, KeyError, TypeError) as error:
        return TrialRow(row.id, row.assignment, row.config, UNREADABLE, note=str(error))


def _checkpoints(run: RunDir) -> tuple[CheckpointRow, ...]:
    return tuple(
        CheckpointRow(step, int(record["images"]), float(record["epochs"]), _finite_metrics(record["metrics"]))
        for step, record in checkpoint_scores(run).items()
    )


def _code(run: RunDir) -> dict[str, Any]:
    code = read_json(run.code_file) or {}
    return {"commit": code.get("commit"), "is_dirty": bool(code.get("dirty"))}


def _finite_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if _is_finite(value)}


def _observe(row: TrialRow, run: RunDir) -> TrialRow:
    done = _read_object(run.done_file)
    status = _read_object(run.status_file) or {}
    attempts = load_attempts(run)
    every = (*attempts, *load_attempts(run.evaluation))
    spent = sum(attempt.seconds for attempt in every), sum(attempt.rank_seconds for attempt in every)
    if done is not None:
        return _done_row(row, done, status, num_attempts=len(attempts), spent=spent)
    return TrialRow(
        row.id,
        row.assignment,
        row.config,
        _unfinished_state(run, status, attempts),
        step=status.get("step"),
        total_steps=status.get("total_steps") or row.total_steps,
        images=status.get("images"),
        spent_seconds=spent[0],
        spent_rank_seconds=spent[1],
        world_size=status.get("world_size"),
        num_attempts=len(attempts),
    )


def _done_row(
    row: TrialRow, done: dict[str, Any], status: dict[str, Any], *, num_attempts: int, spent: tuple[float, float]
) -> TrialRow:
    if done["fingerprint"] != row.id:
        raise ValueError(f"results/done.json is of {done['fingerprint']}, another config")
    return TrialRow(
        row.id,
        row.assignment,
        row.config,
        "done",
        step=int(done["step"]),
        total_steps=int(status.get("total_steps") or done["step"]),
        images=int(done["images"]),
        epochs=float(done["epochs"]),
        train_seconds=float(done["train_seconds"]),
        rank_seconds=float(done["rank_seconds"]),
        spent_seconds=spent[0],
        spent_rank_seconds=spent[1],
        world_size=int(done["world_size"]),
        device=str(done["device"]),
        num_attempts=num_attempts,
        metrics=_finite_metrics(done["metrics"]),
        versions={name: str(version) for name, version in (done.get("versions") or {}).items()},
    )


def _unfinished_state(run: RunDir, status: dict[str, Any], attempts: Sequence[AttemptRecord]) -> str:
    """Name the state by what ended the last attempt; a heartbeat is believed only while nothing says that it ended."""
    if run.cancelled_file.exists():
        return "cancelled"
    last = attempts[-1] if attempts else None
    if last is not None and last.exit_code is not None:
        return INTERRUPTED if last.exit_code >= SIGNAL_BASE else _EXITS.get(last.exit_code, "failed")
    if last is not None and _is_lost(run, last):
        return INTERRUPTED
    state = status.get("state", "starting" if last else NOT_STARTED)
    if last is not None and int(status.get("attempt") or last.number) < last.number:
        state = "starting"
    # Only done.json proves completion; without it a rank that says "done" is still about to write it.
    return "evaluating" if state == "done" else str(state)


def _is_lost(run: RunDir, attempt: AttemptRecord) -> bool:
    """Tell whether the job of an attempt is known to be gone; a worker started by hand leaves no record of one."""
    job = read_json(job_file(run, attempt.number))
    return job is not None and sign_of_life(run, job)[0] is Phase.LOST


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged: not an object")
    return value


def _sample_lines(path: Path, max_points: int) -> Iterator[dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(max_points):
            file.seek(size * index // max_points)
            if index:
                file.readline()  # lands inside a line: go on from the next whole one
            try:
                value = json.loads(file.readline())
            except ValueError:
                continue  # the last line of a run that is still writing
            if isinstance(value, dict):
                yield value


def _is_loss(line: dict[str, Any]) -> bool:
    return all(_is_finite(line.get(key)) for key in ("step", "epoch", "loss"))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
