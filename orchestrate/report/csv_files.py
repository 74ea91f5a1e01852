"""The numbers of the page as CSV: values as measured, no rounding, empty where there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from orchestrate.report.curves import Baseline, Curve, Point, Spread
from orchestrate.report.queries import Sweep, flatten
from orchestrate.report.tables import axis_value, plain, swept_axes
from orchestrate.runs import write_text

_TRIAL_FIELDS = (
    "state", "note", "device", "world_size", "num_attempts", "step", "total_steps", "images", "epochs",
    "train_seconds", "rank_seconds", "spent_seconds", "spent_rank_seconds",
)  # fmt: skip
_SPREAD_FIELDS = ("mean", "min", "max", "std", "n")


def write_trials(path: Path, sweep: Sweep) -> None:
    """Write a row for each trial: state, cost, every config axis (the swept ones first) and every metric."""
    swept = swept_axes(sweep.trials)
    axes = [*swept, *sorted({axis for trial in sweep.trials for axis in flatten(trial.config)} - set(swept))]
    metrics = sorted({name for trial in sweep.trials for name in trial.metrics})
    rows = [
        [
            trial.id,
            *(_text(getattr(trial, name)) for name in _TRIAL_FIELDS),
            *(plain(axis_value(trial, axis)) for axis in axes),
            *(_text(trial.metrics.get(name)) for name in metrics),
        ]
        for trial in sweep.trials
    ]
    _write(path, ["trial", *_TRIAL_FIELDS, *axes, *metrics], rows)


def write_checkpoints(path: Path, sweep: Sweep) -> None:
    """Write a row for each checkpoint that was scored, with the swept axes and all metrics; no file for none."""
    rows = [(trial, checkpoint) for trial in sweep.trials for checkpoint in trial.checkpoints]
    axes = swept_axes(sweep.trials)
    metrics = sorted({name for _, checkpoint in rows for name in checkpoint.metrics})
    cells = [
        [
            trial.id,
            *(plain(axis_value(trial, axis)) for axis in axes),
            *(_text(value) for value in (checkpoint.step, checkpoint.images, checkpoint.epochs)),
            *(_text(checkpoint.metrics.get(name)) for name in metrics),
        ]
        for trial, checkpoint in rows
    ]
    if cells:
        _write(path, ["trial", *axes, "step", "images", "epochs", *metrics], cells)


def write_curves(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Write a row for each point of each metric's curves; costs are means over the seeds, margins are paired."""
    header = ["metric", "method", "embed_dim", "variant", "budget", "epochs", "images", "train_seconds", "rank_seconds"]
    header += [*_SPREAD_FIELDS, "n_planned"]
    header += [f"{margin}_{name}" for margin in ("over_random_init", "over_raw_pixels") for name in _SPREAD_FIELDS]
    rows = [
        [metric, *_curve_cells(curve), *_point_cells(point)]
        for metric, found in curves.items()
        for curve in found
        for point in curve.points
    ]
    _write(path, header, rows)


def write_baselines(path: Path, baselines: Mapping[str, Sequence[Baseline]]) -> None:
    """Write a row for each metric and encoder that learned nothing."""
    rows = [
        [metric, baseline.encoder, baseline.backbone, *_spread_cells(baseline.value)]
        for metric, found in baselines.items()
        for baseline in found
    ]
    _write(path, ["metric", "encoder", "backbone", *_SPREAD_FIELDS], rows)


def _curve_cells(curve: Curve) -> list[str]:
    line = curve.line
    return [line.method, _text(line.embed_dim), " ".join(f"{axis}={value}" for axis, value in line.variant)]


def _point_cells(point: Point) -> list[str]:
    costs = (point.epochs, point.images, point.train_seconds, point.rank_seconds)
    value = [*_spread_cells(point.value), _text(point.num_planned)]
    margins = [*_spread_cells(point.over_random_init), *_spread_cells(point.over_raw_pixels)]
    return [point.budget, *(_text(cost) for cost in costs), *value, *margins]


def _spread_cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return [""] * len(_SPREAD_FIELDS)
    return [_text(value) for value in (spread.mean, spread.low, spread.high, spread.std, spread.n)]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
