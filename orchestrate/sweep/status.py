"""What a sweep looks like now: rows of facts, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrate.runs import read_json
from orchestrate.score_files import checkpoint_scores
from orchestrate.sweep.ledger import Ledger, add_up
from orchestrate.sweep.observe import done_record, run_dir_of
from orchestrate.sweep.observed import Observed, ledger_of
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted
from orchestrate.sweep.standing import State, assess

_COLOURS = {
    State.COMPLETED: "green",
    State.RUNNING: "cyan",
    State.QUEUED: "cyan",
    State.INTERRUPTED: "yellow",
    State.TRAINED: "cyan",
    State.FAILED: "bold red",
    State.DIVERGED: "magenta",
    State.HELD: "bold yellow",
    State.CANCELLED: "dim",
    State.PENDING: "dim",
}

_LIVE_FACTS = (
    "images_per_second",
    "data_wait_percent",
    "eta_seconds",
    "step_seconds_p50",
    "step_seconds_p95",
    "peak_memory_gb",
)


@dataclass(frozen=True)
class TrialStatus:
    """One trial as `orchestrate status` tells it; None where nothing is known.

    Attributes:
        state, cause, reason: what, why in a word, why in a sentence.
        activity: what the worker says it does, such as `training`, while a job runs; `held in Slurm` while it waits so.
        step, total_steps, images: optimizer steps and images so far.
        images_per_second, data_wait_percent, loss, eta_seconds: from the heartbeat, or the whole training when done.
        step_seconds_p50, step_seconds_p95: times of the last steps, while a job is live.
        peak_memory_gb: most that the main rank has held, on its GPU if it has one, while a job is live.
        attempts: jobs started; rank_hours: what they cost, lost ones too; hours: what of it bought what.
        value: the sweep's objective, when done; metrics: all numbers, when done.
        milestones: numbers of checkpoints that were scored, by their steps.
    """

    id: str
    assignment: Mapping[str, Any]
    state: State
    reason: str
    cause: str | None = None
    activity: str | None = None
    step: int | None = None
    total_steps: int | None = None
    images: int | None = None
    images_per_second: float | None = None
    data_wait_percent: float | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    step_seconds_p50: float | None = None
    step_seconds_p95: float | None = None
    peak_memory_gb: float | None = None
    attempts: int = 0
    rank_hours: float = 0.0
    hours: Ledger = field(default_factory=Ledger)
    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    milestones: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def sweep_status(record: SweepRecord, runs: Path, observed: Mapping[str, Observed]) -> list[TrialStatus]:
    """Join what was seen of trials with what their workers say."""
    metric = record.objective["metric"]
    looked_at = [trial for trial in record.trials if trial.id in observed]
    return [trial_status(trial, runs, observed[trial.id], metric) for trial in looked_at]


def trial_status(trial: TrialEntry, runs: Path, seen: Observed, metric: str) -> TrialStatus:
    """Say everything about one trial; `metric` is the sweep's objective."""
    run = run_dir_of(runs, trial.id)
    done = done_record(run) or {}
    beat = read_json(run.status_file) or {}
    place = assess(seen)
    hours = ledger_of(seen).rounded()
    metrics = {str(key): float(value) for key, value in (done.get("metrics") or {}).items() if value is not None}
    facts = _facts_of_done(done) if done else _facts_of_heartbeat(beat, live=place.state is State.RUNNING)
    if any(job.hold for job in seen.live_jobs):
        facts["activity"] = "held in Slurm"
    return TrialStatus(
        id=trial.id,
        assignment=trial.assignment,
        state=place.state,
        reason=place.reason,
        cause=str(place.cause) if place.cause else None,
        total_steps=trial.total_steps,
        attempts=sum(attempt.has_begun for attempt in seen.attempts),
        rank_hours=round(hours.total, 6),
        hours=hours,
        value=objective_value(metrics, metric),
        metrics=metrics,
        milestones={step: scores["metrics"] for step, scores in checkpoint_scores(run).items()},
        **facts,
    )


def _facts_of_done(done: Mapping[str, Any]) -> dict[str, Any]:
    seconds = float(done.get("train_seconds") or 0.0)
    speed = float(done["images"]) / seconds if seconds and done.get("images") else None
    return {"step": done.get("step"), "images": done.get("images"), "images_per_second": speed}


def _facts_of_heartbeat(beat: Mapping[str, Any], *, live: bool) -> dict[str, Any]:
    facts = {key: _finite(beat.get(key)) for key in ("step", "images", "loss")}
    if live:
        facts |= {"activity": beat.get("state")} | {key: _finite(beat.get(key)) for key in _LIVE_FACTS}
    return facts


def _finite(value: Any) -> Any:
    """Leave out what JSON cannot write: a diverged loss is not a number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def objective_value(metrics: Mapping[str, float], metric: str) -> float | None:
    """Find a metric by its key, or by the name of its probe where only one protocol of it was measured.

    `knn.top1` finds `knn_k20_cosine.top1`.
    """
    if metric in metrics:
        return metrics[metric]
    probe, _, number = metric.rpartition(".")
    fitting = [key for key in metrics if key.startswith(f"{probe}_") and key.rpartition(".")[2] == number]
    return metrics[fitting[0]] if probe and len(fitting) == 1 else None


def status_json(record: SweepRecord, rows: Sequence[TrialStatus]) -> dict[str, Any]:
    """Return the status as plain values, the same whenever the files are the same."""
    counts = {str(state): sum(row.state is state for row in rows) for state in State}
    return {
        "sweep": record.name,
        "objective": record.objective,
        "counts": {state: count for state, count in counts.items() if count},
        "rank_hours": round(sum(row.rank_hours for row in rows), 6),
        "hours": asdict(add_up(row.hours for row in rows).rounded()),
        "trials": [asdict(row) for row in rows],
    }


def status_table(record: SweepRecord, rows: Sequence[TrialStatus], *, limit: int | None = None) -> RenderableType:
    """Draw the trials of a sweep, at most `limit`, with the progress of the whole above.

    If there is room, times of steps and memory are shown where a running trial tells them, and hours with the part of
    them that bought nothing where a trial needed several attempts.
    """
    shown = rows[:limit]
    metric = record.objective["metric"]
    waste = any(row.attempts > 1 for row in shown)
    details = any(row.step_seconds_p50 is not None for row in shown)
    choices = [(True, True), (True, False), (False, True), (False, False)]
    fitting = [choice for choice in choices if choice[0] <= waste and choice[1] <= details]
    tables = [_table(shown, metric, waste=has_waste, details=has_details) for has_waste, has_details in fitting]
    more = [f"... and {len(rows) - limit} more"] if limit is not None and len(rows) > limit else []
    removed = [f"no longer in the sweep, but kept: {counted(len(record.removed), 'trial')}"] if record.removed else []
    return Group(_headline(record, rows), "", _FirstThatFits(tables), *more, *removed)


class _FirstThatFits:
    """The first of some tables that fits the width of the console, else the last."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10**6)
        fitting = (
            table for table in self._tables if console.measure(table, options=unbounded).maximum <= options.max_width
        )
        yield next(fitting, self._tables[-1])


def _table(rows: Sequence[TrialStatus], metric: str, *, waste: bool, details: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    axes = _axes(rows)
    for title in ("trial", *(axis.rpartition(".")[2] for axis in axes), "state"):
        table.add_column(title, no_wrap=True)
    for title in (
        "step",
        "images/s",
        "wait",
        *(("attempts", "rank-hours", "lost") if waste else ()),
        *(("s/step p50", "p95", "memory") if details else ()),
        "loss",
        "ETA",
        metric,
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        assigned = (axis_value(row.assignment.get(axis, "")) for axis in axes)
        table.add_row(row.id[:8], *assigned, *_cells(row, waste=waste, details=details))
    return table


def axis_value(value: Any) -> str:
    """Write the value of an axis; numbers as short as they can be."""
    return format(value, "g") if isinstance(value, float) else str(value)


def _axes(rows: Sequence[TrialStatus]) -> list[str]:
    return list(dict.fromkeys(axis for row in rows for axis in row.assignment))


def _cells(row: TrialStatus, *, waste: bool, details: bool) -> list[RenderableType]:
    state = Text(state_label(row), style=_COLOURS[row.state])
    steps = "" if row.step is None else f"{row.step}/{row.total_steps}"
    wait = "" if row.data_wait_percent is None else f"{row.data_wait_percent:.0f} %"
    eta = "" if row.eta_seconds is None else duration(row.eta_seconds)
    hours = [str(row.attempts or ""), _number(row.rank_hours or None, ".3g"), _lost(row)]
    times = [_seconds(row.step_seconds_p50), _seconds(row.step_seconds_p95), _memory(row)]
    return [state, steps, _number(row.images_per_second, ".0f"), wait, *(hours if waste else []),
            *(times if details else []), _number(row.loss, ".3f"), eta, _number(row.value, ".4f")]  # fmt: skip


def _lost(row: TrialStatus) -> str:
    return f"{1 - row.hours.useful / row.rank_hours:.0%}" if row.rank_hours else ""


def _seconds(value: float | None) -> str:
    return _number(value, ".2g" if value is not None and value < 10 else ".0f")


def _memory(row: TrialStatus) -> str:
    return "" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.1f} GB"


def state_label(row: TrialStatus) -> str:
    """Name the state with the word that matters most beside it."""
    if row.state in (State.RUNNING, State.QUEUED, State.HELD) and row.activity not in (None, "training"):
        return f"{row.state} ({row.activity})"
    if row.cause and row.state in (State.FAILED, State.INTERRUPTED, State.HELD):
        return f"{row.state} ({row.cause})"
    return str(row.state)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Write a time span with its two largest units: `3 h 20 min`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def fraction_done(rows: Iterable[TrialStatus]) -> float:
    """Return the part of all optimizer steps that is made."""
    listed = list(rows)
    total = sum(row.total_steps or 1 for row in listed)
    made = sum((row.total_steps or 1) if row.state is State.COMPLETED else (row.step or 0) for row in listed)
    return made / total if total else 0.0


def _headline(record: SweepRecord, rows: Sequence[TrialStatus]) -> RenderableType:
    counts = [(state, sum(row.state is state for row in rows)) for state in State]
    line = Text(record.name, style="bold")
    line.append("  ")
    for state, count in counts:
        if count:
            line.append(f" {count} {state.lower()} ", style=_COLOURS[state])
    hours = sum(row.rank_hours for row in rows)
    made = fraction_done(rows)
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=1.0, completed=made, width=24)
    grid.add_row(line, bar, f"{made:.0%} of steps", f"{hours:.2f} rank-hours")
    return grid


def overview_table(records: Sequence[SweepRecord], statuses: Mapping[str, Sequence[TrialStatus]]) -> RenderableType:
    """Draw all sweeps of a runs folder, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("sweep", "trials", "states", "steps", "rank-hours", "file"):
        table.add_column(title, no_wrap=title != "states")
    for record in records:
        rows = statuses[record.name]
        counts = ((state, sum(row.state is state for row in rows)) for state in State)
        states = ", ".join(f"{count} {state.lower()}" for state, count in counts if count)
        hours = sum(row.rank_hours for row in rows)
        table.add_row(record.name, str(len(rows)), states, f"{fraction_done(rows):.0%}", f"{hours:.2f}", record.file)
    return table
