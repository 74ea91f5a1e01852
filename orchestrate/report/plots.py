"""Figures: accuracy against what was spent and against swept numbers, and the losses behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrate.report import ticks
from orchestrate.report.curves import Baseline, Cost, Curve, Line, Spread, dimensions, lines_along
from orchestrate.report.looks import RANDOM_INIT, RAW_PIXELS, Look, darken, lighten, line_looks, method_looks
from orchestrate.report.svg import MUTED, PIXELS_PER_INCH, house_style, new_figure, to_inline_svg
from orchestrate.report.wording import RANK_TIME, Metric, axis_name, budget_name, line_name, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COST_LABELS: dict[Cost, str] = {
    "epochs": "epochs of training",
    "images": "images seen",
    "rank_seconds": f"compute ({RANK_TIME})",
    "train_seconds": "wall-clock time",
}
PANEL_WIDTH, BROAD_PANEL_WIDTH, PANEL_HEIGHT = 336, 450, 300  # three or two in a row
WIDE_WIDTH, WIDE_HEIGHT = 1040, 430
MAX_LABELLED_LINES = 18
_LEFT, _BOTTOM, _TOP, _PANEL_MARGIN = 48, 50, 38, 88  # pixels around the axes
_LABEL_HEIGHT = 17.0  # pixels from one label to the next
_CHARACTER = 6.8  # pixels of an average letter, generous

Losses = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Data:
    """What the figures of one metric share.

    `lines` are all lines of the sweep, measured or not: looks are chosen over them, so that a line looks the same in
    every figure of the page and keeps its look as results come in.
    """

    metric: Metric
    curves: tuple[Curve, ...]
    baselines: tuple[Baseline, ...]
    lines: tuple[Line, ...]

    @property
    def scale(self) -> float:
        """Give the factor from values to what is drawn: percent for accuracies."""
        return 100.0 if self.metric.is_fraction else 1.0

    @property
    def value_limits(self) -> tuple[float, float]:
        """Give the drawn range: every seed and baseline, and a margin."""
        spreads = [point.value for curve in self.curves for point in curve.points]
        spreads += [baseline.value for baseline in self.baselines]
        low, high = (self.scale * end for end in (min(s.low for s in spreads), max(s.high for s in spreads)))
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        return low - pad, high + pad

    @property
    def looks(self) -> dict[Line, Look]:
        """Give every line its look."""
        return line_looks(self.lines)


@dataclass(frozen=True)
class _Label:
    """A name in the right margin, tied to the height at which its line ends."""

    text: str
    y: float
    colour: str
    x: float | None = None


def wide_figure(data: Data, shown: Sequence[Curve], *, name: str, alt: str) -> str:
    """Draw value against epochs, with the names of lines and baselines in the right margin.

    Args:
        data: of the metric; colours, limits and ticks are chosen over all of its curves.
        shown: the curves to draw, at most `MAX_LABELLED_LINES` for readable labels.
        name, alt: see `to_inline_svg`.
    """
    with house_style():
        labels = [*_curve_labels(data, shown), *_baseline_labels(data)]
        right = 40 + _CHARACTER * max(len(label.text) for label in labels)
        figure = new_figure(WIDE_WIDTH, max(WIDE_HEIGHT, 100 + _LABEL_HEIGHT * len(labels)))
        axes = _framed(figure, right=right)
        _draw_curves(axes, data, shown, cost="epochs")
        _draw_frame(axes, data, data.metric.label)
        _write_labels(axes, labels)
        return to_inline_svg(figure, name=name, alt=alt)


def cost_panel(data: Data, shown: Sequence[Curve], cost: Cost, *, name: str, alt: str) -> str:
    """Draw value against one of the costs, small; the names of the lines are the legend's."""
    with house_style():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        axes = _framed(figure, right=_PANEL_MARGIN)
        _draw_curves(axes, data, shown, cost=cost)
        _draw_frame(axes, data, data.metric.label)
        _write_labels(axes, _baseline_labels(data, is_short=True))
        return to_inline_svg(figure, name=name, alt=alt)


def number_panel(data: Data, axis: str, budget: str, *, width: float, name: str, alt: str) -> str:
    """Draw value against a swept number at one budget, a line for each method; width in pixels."""
    with house_style():
        figure = new_figure(width, PANEL_HEIGHT)
        axes = _framed(figure, right=_PANEL_MARGIN)
        _draw_numbers(axes, data, axis, budget)
        _draw_frame(axes, data, f"After {printable(budget_name(budget), limit=30)}", weight="bold")
        _write_labels(axes, _baseline_labels(data, is_short=True))
        return to_inline_svg(figure, name=name, alt=alt)


def loss_panel(method: str, losses: Sequence[tuple[Look, Losses]], *, name: str, alt: str) -> str:
    """Draw the training losses of one method's trials against epochs; `method` is the title."""
    with house_style():
        figure = new_figure(PANEL_WIDTH, 230)
        axes = _framed(figure, right=14)
        for look, points in losses:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, color=look.colour, linewidth=1.1, dashes=look.dashes or (None, None))
        axes.set_xlabel("epoch")
        axes.margins(x=0.02)
        ticks.set_loss_axis(axes)
        _write_title(axes, printable(method, limit=40), weight="bold")
        return to_inline_svg(figure, name=name, alt=alt)


def spread_out(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move positions as little as needed to lie `gap` apart, in order, and below `high`; above `low` if they fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    floor = low
    for index in order:
        moved[index] = max(moved[index], floor)
        floor = moved[index] + gap
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def _framed(figure: Figure, *, right: float) -> Axes:
    """Add axes with margins in pixels."""
    width, height = (float(inches) * PIXELS_PER_INCH for inches in figure.get_size_inches())
    inner_width, inner_height = width - _LEFT - right, height - _BOTTOM - _TOP
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inner_width / width, inner_height / height))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=4)
    return axes


def _draw_curves(axes: Axes, data: Data, shown: Sequence[Curve], *, cost: Cost) -> None:
    looks = data.looks
    for curve in shown:
        _draw_line(axes, data, [(point.cost(cost), point.value) for point in curve.points], looks[curve.line])
    ticks.set_cost_axis(axes, cost, [point.cost(cost) for curve in data.curves for point in curve.points])
    axes.set_xlabel(COST_LABELS[cost])


def _draw_numbers(axes: Axes, data: Data, axis: str, budget: str) -> None:
    looks = method_looks(data.lines)
    lines = lines_along(data.curves, axis)
    for line, curves in lines.items():
        if points := [(number, point.value) for number, curve in curves.items() if (point := curve.at(budget))]:
            _draw_line(axes, data, points, looks[line.method])
    ticks.set_number_axis(axes, sorted({number for curves in lines.values() for number in curves}), axis_name(axis))


def _draw_line(axes: Axes, data: Data, points: Sequence[tuple[float, Spread]], look: Look) -> None:
    """Draw means joined by a line, and a bar from the lowest to the highest seed."""
    x = [position for position, _ in points]
    mean = [data.scale * value.mean for _, value in points]
    below = [data.scale * (value.mean - value.low) for _, value in points]
    above = [data.scale * (value.high - value.mean) for _, value in points]
    bars = axes.errorbar(
        x, mean, yerr=(below, above), color=look.colour, marker=look.marker, markeredgecolor="white",
        markeredgewidth=0.7, elinewidth=1.1, capsize=2.5, capthick=1.1, zorder=3,
    )  # fmt: skip
    bars.lines[0].set_dashes(look.dashes or (None, None))


def _draw_frame(axes: Axes, data: Data, title: str, *, weight: str = "normal") -> None:
    """Draw the baselines, the value axis and the title: the same in all figures of a metric."""
    for baseline in data.baselines:
        look, value = _baseline_look(baseline), baseline.value
        axes.axhline(data.scale * value.mean, color=look.colour, linewidth=1.2, dashes=look.dashes, zorder=2)
        if value.high > value.low:
            axes.axhspan(data.scale * value.low, data.scale * value.high, color=look.colour, alpha=0.1, linewidth=0)
    ticks.set_value_axis(axes, data.value_limits, is_percent=data.metric.is_fraction)
    _write_title(axes, printable(title, limit=60), weight=weight)


def _write_title(axes: Axes, title: str, *, weight: str) -> None:
    axes.annotate(
        title, (0, 1), xycoords=("figure pixels", "axes fraction"), xytext=(0, 14), textcoords="offset pixels",
        fontweight=weight, fontsize=12.5,
    )  # fmt: skip


def _curve_labels(data: Data, shown: Sequence[Curve]) -> list[_Label]:
    looks, has_dims = data.looks, len(dimensions(data.curves)) > 1
    return [
        _Label(
            printable(line_name(curve.line, with_dim=has_dims), limit=36),
            data.scale * curve.last.value.mean,
            darken(looks[curve.line].colour),
            x=curve.last.epochs,
        )
        for curve in shown
    ]


def _baseline_labels(data: Data, *, is_short: bool = False) -> list[_Label]:
    many = sum(baseline.encoder == "random_init" for baseline in data.baselines) > 1
    labels = []
    for baseline in data.baselines:
        text = "raw pixels" if baseline.encoder == "raw_pixels" else "random init"
        if many and baseline.encoder == "random_init":
            text = baseline.backbone if is_short else f"{text} {baseline.backbone}"
        limit = 11 if is_short else 36
        labels.append(_Label(printable(text, limit=limit), data.scale * baseline.value.mean, MUTED))
    return labels


def _write_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write labels beside the axes, moved apart where they would touch, each with a thin line to its own height."""
    box, (low, high) = axes.get_window_extent(), axes.get_ylim()
    heights = [box.height * (label.y - low) / (high - low) for label in labels]
    places = spread_out(heights, gap=_LABEL_HEIGHT, low=0, high=box.height)
    end = axes.get_xlim()[1]
    for label, height, place in zip(labels, heights, places, strict=True):
        colour = lighten(label.colour, 0.45)
        if label.x is not None:
            axes.plot([label.x, end], [label.y] * 2, color=colour, linewidth=0.7, clip_on=False, zorder=1)
        _place_label(axes, label, (height, place), colour)


def _place_label(axes: Axes, label: _Label, heights: tuple[float, float], colour: str) -> None:
    """Write one label at the second height in pixels and tie it to the first."""
    width, height = axes.get_window_extent().size
    ends = [(width + x, y) for x, y in zip((2, 16), heights, strict=True)]
    x, y = ([end[axis] / size for end in ends] for axis, size in ((0, width), (1, height)))
    axes.plot(x, y, color=colour, linewidth=0.8, clip_on=False, transform=axes.transAxes)
    axes.annotate(
        label.text, (x[1], y[1]), xycoords="axes fraction", xytext=(4, -4), textcoords="offset pixels",
        color=label.colour, annotation_clip=False,
    )  # fmt: skip


def _baseline_look(baseline: Baseline) -> Look:
    return RAW_PIXELS if baseline.encoder == "raw_pixels" else RANDOM_INIT
