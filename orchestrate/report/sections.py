"""What stands under each heading of the page: figures with captions, legends, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from orchestrate.report import plots, tables, wording
from orchestrate.report.curves import EMBED_DIM, Cost, Curve, best_per_method, budgets, dimensions, line_of, number_axes
from orchestrate.report.looks import RANDOM_INIT, RAW_PIXELS, Look, line_looks, method_looks
from orchestrate.report.plots import Data
from orchestrate.report.queries import Sweep, TrialRow, sample_losses
from orchestrate.report.tables import Table
from orchestrate.report.wording import line_name, plural
from orchestrate.runs import RunDir

_COSTS: tuple[Cost, ...] = get_args(Cost)


@dataclass(frozen=True)
class LegendEntry:
    """A sample of a line and its name."""

    look: Look
    name: str
    has_marker: bool = True


@dataclass(frozen=True)
class LegendGroup:
    """The lines of one method, or the baselines."""

    name: str
    entries: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class Figure:
    """Pictures, as `<svg>` elements, under one caption."""

    pictures: tuple[str, ...]
    caption: str
    columns: int = 3
    legend: tuple[LegendGroup, ...] = ()


@dataclass(frozen=True)
class MetricSection:
    """All figures and tables of one metric."""

    title: str
    key: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


def metric_section(data: Data, *, goal: str, index: int) -> MetricSection:
    """Draw and tabulate one metric; `index` keeps the names of its pictures apart from other metrics'."""
    name = f"m{index}"
    shown = data.curves
    if len(shown) > plots.MAX_LABELLED_LINES:
        shown = best_per_method(data.curves, goal)[: plots.MAX_LABELLED_LINES]
    figures = [_epochs_figure(data, shown, name), _costs_figure(data, shown, name)]
    figures += [
        _numbers_figure(data, axis, f"{name}-along{number}") for number, axis in enumerate(number_axes(data.curves))
    ]
    found = (
        tables.summary_table(data.curves, data.metric, goal),
        tables.efficiency_table(data.curves, data.metric, goal),
        tables.ratio_table(data.curves, data.metric, goal),
    )
    return MetricSection(data.metric.title, data.metric.key, tuple(figures), tuple(table for table in found if table))


def loss_figure(sweep: Sweep, trials_dir: Path) -> Figure | None:
    """Draw the training losses of each method's longest trials; None if nothing was logged."""
    lines = line_of(sweep.trials)
    looks = line_looks(tuple(lines.values()))
    pictures = []
    for index, method in enumerate(sorted({trial.method for trial in sweep.trials})):
        trials = _longest([trial for trial in sweep.trials if trial.method == method])
        losses = [(looks[lines[t.id]], sample_losses(RunDir(trials_dir / t.id))) for t in trials]
        drawn = [(look, points) for look, points in losses if len(points) > 1]
        if drawn:
            alt = f"Training loss of {method} against epochs, {plural(len(drawn), 'trial')}."
            pictures.append(plots.loss_panel(method, drawn, name=f"loss{index}", alt=alt))
    caption = (
        "Training loss of each method's longest budget, a line for each trial; shade and dashes as above. Losses of"
        " different methods or dimensions are not comparable: read them for shape only."
    )
    return Figure(tuple(pictures), caption) if pictures else None


def legend(data: Data, shown: Sequence[Curve]) -> tuple[LegendGroup, ...]:
    """Name the lines shown, grouped by method, then the baselines."""
    looks, has_dims = data.looks, len(dimensions(data.curves)) > 1
    groups = []
    for method in dict.fromkeys(curve.line.method for curve in shown):
        own = [curve.line for curve in shown if curve.line.method == method]
        names = [line_name(line, with_dim=has_dims).removeprefix(method).removeprefix(" · ") for line in own]
        entries = [LegendEntry(looks[line], name) for line, name in zip(own, names, strict=True)]
        groups.append(LegendGroup(method, tuple(entries)))
    baselines = {"random_init": ("random-init encoder", RANDOM_INIT), "raw_pixels": ("raw pixels", RAW_PIXELS)}
    present = [baselines[encoder] for encoder in dict.fromkeys(b.encoder for b in data.baselines)]
    if present:
        groups.append(LegendGroup("nothing learned", tuple(LegendEntry(look, name, False) for name, look in present)))
    return tuple(groups)


def _epochs_figure(data: Data, shown: Sequence[Curve], name: str) -> Figure:
    alt = _alt(data, shown, "epochs of training")
    is_whole = len(shown) == len(data.curves)
    which = "a line for each method and dimension" if is_whole else "each method at its best dimension"
    caption = f"{data.metric.title} ({data.metric.key}) against epochs, {which}, a marker for each budget."
    return Figure(
        (plots.wide_figure(data, shown, name=f"{name}-epochs", alt=alt),), f"{caption} {_spread_note(data)}", columns=1
    )


def _costs_figure(data: Data, shown: Sequence[Curve], name: str) -> Figure:
    costs = [cost for cost in _COSTS if cost != "epochs"]
    pictures = [
        plots.cost_panel(data, shown, cost, name=f"{name}-{cost}", alt=_alt(data, shown, plots.COST_LABELS[cost]))
        for cost in costs
    ]
    caption = (
        f"The same points against images seen, compute ({wording.RANK_TIME}) and wall-clock time of the optimizer"
        " steps, each counted once. An image counts once a step, however many views a method takes of it."
    )
    return Figure(tuple(pictures), caption, legend=legend(data, shown))


def _numbers_figure(data: Data, axis: str, name: str) -> Figure:
    pictures, found = [], budgets(data.curves)
    columns = 2 if len(found) in (1, 2, 4) else 3
    width = plots.PANEL_WIDTH if columns == 3 else plots.BROAD_PANEL_WIDTH
    for index, budget in enumerate(found):
        points = {line_name(c.line): p.value.mean for c in data.curves if (p := c.at(budget))}
        values = ", ".join(f"{line} {data.metric.value(value)}" for line, value in points.items())
        alt = f"{data.metric.label} against {wording.axis_name(axis)} after {wording.budget_name(budget)}: {values}."
        pictures.append(plots.number_panel(data, axis, budget, width=width, name=f"{name}-{index}", alt=alt))
    what = f"the {wording.axis_name(axis)}" if axis == EMBED_DIM else wording.axis_name(axis)
    caption = f"{data.metric.title} against {what}, a panel for each budget. {_spread_note(data)}"
    return Figure(tuple(pictures), caption, columns, _method_legend(data))


def _method_legend(data: Data) -> tuple[LegendGroup, ...]:
    """Shorten the legend to one sample a method: along a swept number a line has no shade."""
    looks = method_looks(data.lines)
    names = dict.fromkeys(curve.line.method for curve in data.curves)
    methods = LegendGroup("", tuple(LegendEntry(looks[name], name) for name in names))
    return (methods, *(group for group in legend(data, ()) if group.name == "nothing learned"))


def _spread_note(data: Data) -> str:
    counts = sorted({point.value.n for curve in data.curves for point in curve.points})
    if counts == [1]:
        return "One seed: no spread is shown."
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"Points are means over n = {seeds} seeds, bars reach from the lowest to the highest seed."
    is_wide = any(baseline.value.high > baseline.value.low for baseline in data.baselines)
    return f"{note} Grey bands: lowest to highest baseline over all trials." if is_wide else note


def _alt(data: Data, shown: Sequence[Curve], cost: str) -> str:
    ends = [f"{line_name(c.line)} {data.metric.value(c.last.value.mean)} after {c.last.budget}" for c in shown]
    ends += [
        f"{tables.ENCODERS[baseline.encoder]} {data.metric.value(baseline.value.mean)}" for baseline in data.baselines
    ]
    return f"{data.metric.label} against {cost}. Where the lines end: {'; '.join(ends)}."


def _longest(trials: Sequence[TrialRow]) -> list[TrialRow]:
    steps = {trial.budget: trial.total_steps or 0 for trial in sorted(trials, key=lambda t: t.total_steps or 0)}
    longest = max(steps, key=lambda budget: steps[budget])
    return [trial for trial in trials if trial.budget == longest]
