"""Where the marks of an axis go and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrate.report.curves import Cost
from orchestrate.report.wording import epochs, minus, short_count, tick_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_ABOVE = 4.0  # a logarithmic axis once the largest value is more than so many times the smallest
_MOST_TICKS = 5
_CHARACTER = 7.0  # pixels of an average digit or letter, generous
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_TIMES = (
    *(size * 10.0**power for power in range(-3, 1) for size in (1, 2, 5)),
    *(10, 20, 30, _MINUTE, 2 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 20 * _MINUTE, 30 * _MINUTE),
    *(_HOUR, 2 * _HOUR, 4 * _HOUR, 8 * _HOUR, 12 * _HOUR),
    *(size * _DAY * 10**power for power in range(5) for size in (1, 2, 5)),
)
_COUNTS = tuple(size * 10.0**power for power in range(-3, 13) for size in (1, 2, 5))


def is_log(values: Iterable[float]) -> bool:
    """Decide whether values span so much that their logarithms tell more."""
    numbers = list(values)
    return min(numbers) > 0 and max(numbers) > _LOG_ABOVE * min(numbers)


def clear_of(places: Sequence[float], widths: Sequence[float], *, gap: float) -> list[int]:
    """Choose labels that keep `gap` between them, from the last one back.

    Args:
        places: centres of the labels, rising.
        widths: of the labels.
        gap: least distance from the end of one to the start of the next; all three in one unit.

    Returns:
        Indices of the labels to write, rising.
    """
    kept: list[int] = []
    free = math.inf
    for index in reversed(range(len(places))):
        if places[index] + widths[index] / 2 <= free:
            kept.insert(0, index)
            free = places[index] - widths[index] / 2 - gap
    return kept


def round_marks(low: float, high: float, steps: Sequence[float], *, logarithmic: bool) -> list[float]:
    """Choose a few round numbers in [low, high].

    Args:
        low, high: ends of the axis.
        steps: the numbers called round, rising.
        logarithmic: take the marks from `steps` themselves; otherwise multiples of one of them.
    """
    if logarithmic:
        return [step for step in steps if low <= step <= high]
    step = next((step for step in steps if (high - low) / step <= _MOST_TICKS), steps[-1])
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def set_cost_axis(axes: Axes, cost: Cost, values: Sequence[float]) -> None:
    """Scale and label the x axis for one of the costs; epochs are marked at the budgets themselves."""
    low, high = min(values), max(values)
    logarithmic = is_log(values)
    _set_scale(axes, low, high, logarithmic=logarithmic)
    if cost == "epochs":
        marks = sorted(set(values))
    else:
        steps = _COUNTS if cost == "images" else _TIMES
        marks = round_marks(*axes.get_xlim(), steps, logarithmic=logarithmic)
    _set_marks(axes, marks, _names(marks, cost, logarithmic=logarithmic))


def set_number_axis(axes: Axes, numbers: Sequence[float], label: str) -> None:
    """Scale and label the x axis for a swept number, such as the embedding dimension; each value is marked."""
    logarithmic = numbers[0] > 0 and (len(numbers) > 2 or is_log(numbers))
    _set_scale(axes, numbers[0], numbers[-1], logarithmic=logarithmic)
    _set_marks(axes, numbers, [minus(f"{number:.10g}") for number in numbers])
    axes.set_xlabel(label)


def set_value_axis(axes: Axes, limits: tuple[float, float], *, is_percent: bool) -> None:
    """Scale and label the y axis of a metric."""
    axes.set_ylim(limits)
    axes.yaxis.set_major_formatter(lambda value, _: minus(f"{value:.4g} %" if is_percent else f"{value:.4g}"))


def set_loss_axis(axes: Axes) -> None:
    """Write the y axis of a loss in short numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: minus(short_count(value)))


def _names(marks: Sequence[float], cost: Cost, *, logarithmic: bool) -> list[str]:
    if cost == "epochs":
        return [epochs(mark) for mark in marks]
    if cost == "images":
        return [short_count(mark) for mark in marks]
    # Even steps read best in one unit, that of the step; a logarithmic axis goes through several.
    unit_of = None if logarithmic or len(marks) < 2 else marks[1] - marks[0]
    return [tick_duration(mark, unit_of=unit_of) for mark in marks]


def _set_scale(axes: Axes, low: float, high: float, *, logarithmic: bool) -> None:
    if logarithmic:
        pad = (high / low) ** 0.05
        axes.set_xscale("log")
        axes.set_xlim(low / pad, high * pad)
    else:
        pad = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        axes.set_xlim(low - pad, high + pad)


def _set_marks(axes: Axes, marks: Sequence[float], names: Sequence[str]) -> None:
    """Put marks on the x axis, less those whose names would touch the next one's."""
    places = [float(axes.transData.transform((mark, 0))[0]) for mark in marks]
    kept = clear_of(places, [_CHARACTER * len(name) for name in names], gap=8)
    axes.set_xticks([marks[index] for index in kept], [names[index] for index in kept])
    axes.minorticks_off()
