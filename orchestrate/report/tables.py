"""The tables of the page, as text in cells."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrate.report import wording
from orchestrate.report.curves import (
    Baseline,
    Curve,
    Point,
    Reach,
    Spread,
    best_at_largest_budget,
    best_per_method,
    efficiency_ratio,
    gain_per_doubling,
    reach,
    target_for_gain,
)
from orchestrate.report.queries import Sweep, TrialRow, flatten
from orchestrate.report.wording import NONE, RANK_TIME, SPACE, TIMES, Metric, line_name

ENCODERS = {"random_init": "random-init encoder", "raw_pixels": "raw pixels"}
TARGET_FRACTIONS = (0.5, 0.75, 0.9)
Kind = Literal["text", "number", "code", "state"]


@dataclass(frozen=True)
class Cell:
    """One cell; `kind` says how to align and mark it, `is_best` that it stands out."""

    text: str
    kind: Kind = "text"
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first cell of each row is the row's header; grouped: with a rule where it changes."""

    title: str
    caption: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_grouped: bool = False


def summary_table(curves: Sequence[Curve], metric: Metric, goal: str) -> Table:
    """Tabulate method, dimension and budget: mean, spread over seeds, margins over the baselines."""
    best = _best_points(curves, goal)
    mean = f"#mean,{SPACE}%" if metric.is_fraction else "#mean"
    margins = ("#over random init", "#range", "#over raw pixels")
    costs = ("#wall-clock", f"#{RANK_TIME}")
    columns = _columns("method", "#dimension", "#budget", mean, "#range", "#seeds", *margins, *costs)
    rows = [
        _summary_row(curve, point, metric, is_best=point is best.get(point.budget))
        for curve in curves
        for point in curve.points
    ]
    return Table(
        "Every point",
        f"Mean over seeds of {metric.key}, the best at each budget in bold; ranges go from the lowest to the highest"
        f" seed. Margins{' in points' if metric.is_fraction else ''} are against the baseline of the same trial. Times"
        " are means over the seeds.",
        columns,
        tuple(rows),
        is_grouped=True,
    )


def efficiency_table(curves: Sequence[Curve], metric: Metric, goal: str) -> Table | None:
    """Tabulate the epochs that each curve needs for shares of the best gain; None without a gain over random init."""
    targets = [target_for_gain(curves, fraction, goal=goal) for fraction in TARGET_FRACTIONS]
    known = [target for target in targets if target is not None]
    if not known:
        return None
    names = [
        f"#{100 * share:.0f}{SPACE}% of gain: {metric.value(t)}"
        for share, t in zip(TARGET_FRACTIONS, known, strict=True)
    ]
    columns = _columns(
        "method", "#dimension", *names, f"#compute to {100 * TARGET_FRACTIONS[-1]:.0f}{SPACE}%", "#per doubling"
    )
    rows = []
    for curve in curves:
        reached = [_epochs_text(reach(curve, target, goal=goal)) for target in known]
        compute = _reach_text(reach(curve, known[-1], goal=goal, cost="rank_seconds"), wording.duration)
        gain = gain_per_doubling(curve)
        cells = [*reached, compute, NONE if gain is None else metric.margin(gain)]
        rows.append((*_line_cells(curve), *(Cell(text, "number") for text in cells)))
    return Table(
        "Epochs to a target",
        f"Epochs until the mean {metric.key} has a share of the best gain over the random-init encoder, interpolated"
        " between budgets on a logarithmic scale. ≤: the smallest budget is already there; >: not reached with so much."
        f" Compute is {RANK_TIME}. Per doubling: mean change{metric.margin_unit and ' in points'} each time"
        " the epochs double.",
        columns,
        tuple(rows),
        is_grouped=True,
    )


def ratio_table(curves: Sequence[Curve], metric: Metric, goal: str) -> Table | None:
    """Tabulate how many times fewer epochs the leader needs than each other method; None without a comparison."""
    found = best_at_largest_budget(curves, goal)
    if found is None:
        return None
    leader, rows = found[0], []
    for other in best_per_method(curves, goal):
        if other is not leader and (ratio := efficiency_ratio(leader, other, goal=goal)):
            cells = (
                metric.value(ratio.target),
                f"{ratio.other_epochs:.1f}",
                ("" if ratio.is_exact else "≤ ") + f"{ratio.leader_epochs:.1f}",
                ("" if ratio.is_exact else "≥ ") + f"{ratio.factor:.1f} {TIMES}",
            )
            rows.append((*_line_cells(other), *(Cell(text, "number") for text in cells)))
    if not rows:
        return None
    leader_name = line_name(leader.line)
    columns = _columns("method", "#dimension", "#its best mean", "#its epochs", f"#epochs of {leader_name}", "#ratio")
    return Table(
        "Efficiency ratio",
        f"How many times fewer epochs {leader_name} needs for the same {metric.key}, each method at"
        " its best dimension. ≥: a lower bound, as the smallest budget is already that good. Left out: methods that"
        " the leader never equals, and those whose smallest budget is already their best.",
        columns,
        tuple(rows),
    )


def baseline_table(baselines: Mapping[str, Sequence[Baseline]]) -> Table | None:
    """Tabulate random-init encoders and raw pixels for every metric; None if nothing was measured."""
    rows = []
    for key, found in baselines.items():
        metric = Metric(key)
        for baseline in found:
            value = baseline.value
            rows.append(
                (
                    Cell(ENCODERS[baseline.encoder]),
                    Cell(baseline.backbone or NONE, "code" if baseline.backbone else "text"),
                    Cell(key, "code"),
                    Cell(metric.value(value.mean), "number"),
                    Cell(metric.range(value), "number"),
                    Cell(str(value.n), "number"),
                )
            )
    columns = _columns("encoder", "backbone", "metric", "#mean", "#range", "#trials")
    caption = "What the same probes find without any learning; ranges go from the lowest to the highest trial."
    return Table("", caption, columns, tuple(rows)) if rows else None


def trial_table(sweep: Sweep, metrics: Sequence[str]) -> Table:
    """Tabulate every trial of the sweep, whatever its state."""
    axes = [axis for axis in swept_axes(sweep.trials) if axis == "method.name" or _differs(sweep.trials, axis)]
    names = ["trial", *axes, "state", "#step", *(f"#{key}" for key in metrics), "#images", "#wall-clock"]
    columns = _columns(*names, f"#{RANK_TIME}", "#attempts", "device")
    rows = tuple(_trial_row(trial, axes, metrics) for trial in sweep.trials)
    caption = "Every trial and the swept settings in which any differ. Times are of optimizer steps, each counted once."
    return Table("", caption, columns, rows)


def swept_axes(trials: Sequence[TrialRow]) -> tuple[str, ...]:
    """List the flattened axes that any trial was assigned a value of, the method first."""
    found = dict.fromkeys(axis for trial in trials for axis in flatten(trial.assignment))
    return tuple(sorted(found, key=lambda axis: (axis != "method.name", not axis.startswith("method."), axis)))


def axis_value(trial: TrialRow, axis: str) -> Any:
    """Look up an axis in a trial's resolved config, None where its method has no such parameter."""
    return flatten(trial.config).get(axis, flatten(trial.assignment).get(axis))


def plain(value: Any) -> str:
    """Write a config value: text as it is, None as nothing, anything else as JSON."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def count_states(trials: Iterable[TrialRow]) -> Counter[str]:
    """Count the trials in each state."""
    return Counter(trial.state for trial in trials)


def _summary_row(curve: Curve, point: Point, metric: Metric, *, is_best: bool) -> tuple[Cell, ...]:
    over_random, over_pixels = point.over_random_init, point.over_raw_pixels
    seeds = str(point.value.n) if point.value.n == point.num_planned else f"{point.value.n} of {point.num_planned}"
    texts = (
        point.budget if point.budget.endswith("ep") else f"{point.budget} ({wording.epochs(point.epochs)}ep)",
        metric.number(point.value.mean),
        metric.range(point.value),
        seeds,
        _margin_mean(over_random, metric),
        metric.margin_range(over_random) if over_random else NONE,
        _margin_mean(over_pixels, metric),
        wording.duration(point.train_seconds),
        wording.duration(point.rank_seconds),
    )
    cells = (Cell(text, "number", is_best and index == 1) for index, text in enumerate(texts))
    return (*_line_cells(curve), *cells)


def _trial_row(trial: TrialRow, axes: Sequence[str], metrics: Sequence[str]) -> tuple[Cell, ...]:
    steps = NONE if trial.step is None else f"{wording.count(trial.step)} / {wording.count(trial.total_steps)}"
    device = NONE if trial.device is None else f"{trial.device} {TIMES} {trial.world_size}"
    return (
        Cell(trial.id, "code"),
        *(_axis_cell(axis_value(trial, axis)) for axis in axes),
        Cell(f"{trial.state}: {trial.note}" if trial.note else trial.state, "state"),
        Cell(steps, "number"),
        *(_metric_cell(trial, key) for key in metrics),
        Cell(wording.count(trial.images), "number"),
        Cell(wording.duration(trial.train_seconds), "number"),
        Cell(wording.duration(trial.rank_seconds), "number"),
        Cell(str(trial.num_attempts), "number"),
        Cell(device),
    )


def _metric_cell(trial: TrialRow, key: str) -> Cell:
    value = trial.metrics.get(key)
    return Cell(NONE if value is None else Metric(key).value(value), "number")


def _differs(trials: Sequence[TrialRow], axis: str) -> bool:
    return len({plain(axis_value(trial, axis)) for trial in trials}) > 1


def _axis_cell(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(plain(value) or NONE, "number" if is_number else "text")


def _line_cells(curve: Curve) -> tuple[Cell, Cell]:
    line = curve.line
    return Cell(line_name(line, with_dim=False)), Cell(
        NONE if line.embed_dim is None else str(line.embed_dim), "number"
    )


def _margin_mean(margin: Spread | None, metric: Metric) -> str:
    return metric.margin(margin.mean) if margin else NONE


def _epochs_text(reached: Reach) -> str:
    """Write interpolated epochs with a decimal, budgets as they are."""
    return _reach_text(reached, "{:.1f}".format if reached.kind == "exact" else wording.epochs)


def _reach_text(reached: Reach, write: Callable[[float], str]) -> str:
    prefix = {"exact": "", "at most": "≤ ", "not reached": "> "}[reached.kind]
    return prefix + write(reached.cost)


def _best_points(curves: Sequence[Curve], goal: str) -> dict[str, Point]:
    sign = -1 if goal == "min" else 1
    best: dict[str, Point] = {}
    for point in (point for curve in curves for point in curve.points):
        if point.budget not in best or sign * point.value.mean > sign * best[point.budget].value.mean:
            best[point.budget] = point
    return best


def _columns(*names: str) -> tuple[Cell, ...]:
    """Make column headers; a `#` in front makes a column of numbers."""
    return tuple(Cell(name.removeprefix("#"), "number" if name.startswith("#") else "text") for name in names)
