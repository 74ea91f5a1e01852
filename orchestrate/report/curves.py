"""Accuracy as a function of what was spent: means over seeds, margins over baselines, epochs to a target, ratios."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrate.report.queries import TrialRow, flatten

Cost = Literal["epochs", "images", "rank_seconds", "train_seconds"]
EMBED_DIM = "method.embed_dim"
# A curve has one line per method and embedding dimension; along it the budget changes, and seeds are averaged.
_OWN_AXES = frozenset({"method.name", EMBED_DIM, "train.budget", "train.seed"})


@dataclass(frozen=True)
class Spread:
    """Numbers of n seeds in short; `std` is the sample standard deviation, None for one seed."""

    mean: float
    low: float
    high: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Line:
    """What one line of a figure stands for.

    `variant` holds the other swept axes in which otherwise equal trials differ; without it a swept learning rate
    would pass for a spread over seeds.
    """

    method: str
    embed_dim: int | None
    variant: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Point:
    """The finished trials of one line at one budget; costs are means over its seeds.

    Margins are paired: each trial against the baseline that it measured itself, on its own seed and backbone.
    """

    budget: str
    value: Spread
    over_random_init: Spread | None
    over_raw_pixels: Spread | None
    epochs: float
    images: float
    rank_seconds: float
    train_seconds: float
    num_planned: int

    def cost(self, name: Cost) -> float:
        """Look up one of the four costs by name."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class Curve:
    """One line and its points by rising epochs; never empty."""

    line: Line
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        """Give the point with the most epochs."""
        return self.points[-1]

    def at(self, budget: str) -> Point | None:
        """Find the point of a budget."""
        return next((point for point in self.points if point.budget == budget), None)


@dataclass(frozen=True)
class Baseline:
    """What an encoder scores that learned nothing; `backbone` is empty for raw pixels, which have none."""

    encoder: Literal["random_init", "raw_pixels"]
    backbone: str
    value: Spread


@dataclass(frozen=True)
class Reach:
    """The cost at which a curve reaches a target.

    `kind` is `exact` (interpolated), `at most` (its cheapest point is already there) or `not reached`, when `cost` is
    what the curve spent in vain.
    """

    kind: Literal["exact", "at most", "not reached"]
    cost: float


@dataclass(frozen=True)
class Ratio:
    """How many times fewer epochs the leader needs for the other's best value; a lower bound unless `is_exact`."""

    factor: float
    is_exact: bool
    target: float
    leader_epochs: float
    other_epochs: float


def spread(values: Iterable[float]) -> Spread:
    """Summarise at least one number."""
    numbers = sorted(values)
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    # The mean of three times 0.1 is one bit above 0.1; an error bar must not get a negative length from it.
    mean = min(max(statistics.fmean(numbers), numbers[0]), numbers[-1])
    return Spread(mean, numbers[0], numbers[-1], std, len(numbers))


def build_curves(trials: Sequence[TrialRow], metric: str) -> tuple[Curve, ...]:
    """Group the finished trials that have `metric` into lines, ordered by method, dimension, variant."""
    lines = line_of(trials)
    measured = [trial for trial in trials if metric in trial.metrics]
    keys = sorted({lines[trial.id] for trial in measured}, key=_line_order)
    return tuple(Curve(line, _points(line, lines, trials, metric)) for line in keys)


def line_of(trials: Sequence[TrialRow]) -> dict[str, Line]:
    """Say for each trial id which line it belongs to."""
    axes = {method: _variant_axes([t for t in trials if t.method == method]) for method in {t.method for t in trials}}
    return {trial.id: Line(trial.method, trial.embed_dim, _variant(trial, axes[trial.method])) for trial in trials}


def build_baselines(trials: Sequence[TrialRow], metric: str) -> tuple[Baseline, ...]:
    """Summarise random-init encoders (for each backbone) and raw pixels (over all trials) under the same probe."""
    by_backbone: dict[str, list[float]] = {}
    for trial in trials:
        if (value := trial.metrics.get(f"random_init/{metric}")) is not None:
            by_backbone.setdefault(trial.backbone, []).append(value)
    random = tuple(Baseline("random_init", name, spread(values)) for name, values in sorted(by_backbone.items()))
    pixels = [value for trial in trials if (value := trial.metrics.get(f"raw_pixels/{metric}")) is not None]
    return (*random, *((Baseline("raw_pixels", "", spread(pixels)),) if pixels else ()))


def budgets(curves: Iterable[Curve]) -> tuple[str, ...]:
    """List the budgets of all curves by rising epochs."""
    epochs = {point.budget: point.epochs for curve in curves for point in curve.points}
    return tuple(sorted(epochs, key=lambda budget: (epochs[budget], budget)))


def dimensions(curves: Iterable[Curve]) -> tuple[int, ...]:
    """List the embedding dimensions of all curves."""
    return tuple(sorted({curve.line.embed_dim for curve in curves if curve.line.embed_dim is not None}))


def number_axes(curves: Sequence[Curve]) -> tuple[str, ...]:
    """List the swept numbers along which a figure can be drawn, the embedding dimension (`EMBED_DIM`) first.

    These are the axes along which some line has two points: hidden widths, learning rates, temperatures.
    """
    names = (EMBED_DIM, *sorted({axis for curve in curves for axis, _ in curve.line.variant}))
    return tuple(name for name in names if any(len(along) > 1 for along in lines_along(curves, name).values()))


def lines_along(curves: Iterable[Curve], axis: str) -> dict[Line, dict[float, Curve]]:
    """Group curves that differ in one swept number alone, by rising number; key: their line without that axis.

    A curve that has no number on this axis is left out.
    """
    found: dict[Line, dict[float, Curve]] = {}
    for curve in curves:
        line = curve.line
        number: float | None
        if axis == EMBED_DIM:
            number, rest = line.embed_dim, replace(line, embed_dim=None)
        else:
            number = _number(dict(line.variant).get(axis, ""))
            rest = replace(line, variant=tuple(pair for pair in line.variant if pair[0] != axis))
        if number is not None:
            found.setdefault(rest, {})[float(number)] = curve
    return {line: dict(sorted(numbers.items())) for line, numbers in found.items()}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def best_at_largest_budget(curves: Sequence[Curve], goal: str) -> tuple[Curve, Point] | None:
    """Pick the curve with the best mean at the largest budget that any trial finished; None without results."""
    if not curves:
        return None
    budget = budgets(curves)[-1]
    candidates = [(curve, point) for curve in curves if (point := curve.at(budget)) is not None]
    return max(candidates, key=lambda pair: _sign(goal) * pair[1].value.mean)


def best_per_method(curves: Sequence[Curve], goal: str) -> tuple[Curve, ...]:
    """Keep each method's best curve: the one with the best mean at that method's own largest budget."""
    kept = []
    for method in dict.fromkeys(curve.line.method for curve in curves):
        best = best_at_largest_budget([curve for curve in curves if curve.line.method == method], goal)
        assert best is not None
        kept.append(best[0])
    return tuple(kept)


def target_for_gain(curves: Sequence[Curve], fraction: float, *, goal: str) -> float | None:
    """Give the value at which `fraction` of the best gain over the random-init encoder is had.

    The best gain is the largest mean of all points minus the mean of the random-init encoder on the same trials.
    None without a random-init baseline, or where no point is better than it.
    """
    points = [p for curve in curves for p in curve.points if p.over_random_init is not None]
    if not points:
        return None
    best = max(points, key=lambda point: _sign(goal) * point.value.mean)
    assert best.over_random_init is not None
    gain = best.over_random_init.mean
    return best.value.mean - (1 - fraction) * gain if _sign(goal) * gain > 0 else None


def reach(curve: Curve, target: float, *, goal: str, cost: Cost = "epochs") -> Reach:
    """Find the lowest cost at which a curve's mean first reaches `target`, linear in the logarithm of the cost."""
    sign = _sign(goal)
    points = sorted(curve.points, key=lambda point: point.cost(cost))
    if sign * points[0].value.mean >= sign * target:
        return Reach("at most", points[0].cost(cost))
    for before, after in itertools.pairwise(points):
        if sign * after.value.mean >= sign * target:
            share = (target - before.value.mean) / (after.value.mean - before.value.mean)
            return Reach("exact", _between(before.cost(cost), after.cost(cost), share))
    return Reach("not reached", points[-1].cost(cost))


def efficiency_ratio(leader: Curve, other: Curve, *, goal: str) -> Ratio | None:
    """Compare the epochs that two curves need for the best mean of `other`.

    A lower bound where the leader's smallest budget is already that good. None where the leader never is, or where
    there is nothing to compare because `other` is as good at its own smallest budget.
    """
    target = max((point.value.mean for point in other.points), key=lambda value: _sign(goal) * value)
    other_reach, leader_reach = (reach(curve, target, goal=goal) for curve in (other, leader))
    if leader_reach.kind == "not reached" or other_reach.kind != "exact":
        return None
    factor = other_reach.cost / leader_reach.cost
    return Ratio(factor, leader_reach.kind == "exact", target, leader_reach.cost, other_reach.cost)


def gain_per_doubling(curve: Curve) -> float | None:
    """Average over a curve how much its mean changed each time the epochs doubled; None for a single budget."""
    first, last = curve.points[0], curve.last
    if last.epochs <= first.epochs:
        return None
    return (last.value.mean - first.value.mean) / math.log2(last.epochs / first.epochs)


def _points(line: Line, lines: dict[str, Line], trials: Sequence[TrialRow], metric: str) -> tuple[Point, ...]:
    own = [trial for trial in trials if lines[trial.id] == line]
    found = []
    for budget in dict.fromkeys(trial.budget for trial in own):
        planned = [trial for trial in own if trial.budget == budget]
        if done := [trial for trial in planned if metric in trial.metrics]:
            found.append(_point(budget, done, metric, num_planned=len(planned)))
    return tuple(sorted(found, key=lambda point: point.epochs))


def _point(budget: str, done: Sequence[TrialRow], metric: str, *, num_planned: int) -> Point:
    return Point(
        budget=budget,
        value=spread(trial.metrics[metric] for trial in done),
        over_random_init=_margin(done, metric, "random_init"),
        over_raw_pixels=_margin(done, metric, "raw_pixels"),
        epochs=_mean(trial.epochs for trial in done),
        images=_mean(trial.images for trial in done),
        rank_seconds=_mean(trial.rank_seconds for trial in done),
        train_seconds=_mean(trial.train_seconds for trial in done),
        num_planned=num_planned,
    )


def _margin(done: Sequence[TrialRow], metric: str, encoder: str) -> Spread | None:
    key = f"{encoder}/{metric}"
    margins = [trial.metrics[metric] - trial.metrics[key] for trial in done if key in trial.metrics]
    return spread(margins) if margins else None


def _mean(values: Iterable[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def _variant_axes(trials: Sequence[TrialRow]) -> tuple[str, ...]:
    """Find the swept axes that differ between trials of one method, dimension and budget, seeds aside."""
    groups: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault((trial.embed_dim, trial.budget), []).append(flatten(trial.assignment))
    axes: set[str] = set()
    for group in groups.values():
        names = {name for flat in group for name in flat} - _OWN_AXES
        axes |= {name for name in names if len({repr(flat.get(name)) for flat in group}) > 1}
    return tuple(sorted(axes))


def _variant(trial: TrialRow, axes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    flat = flatten(trial.assignment)
    return tuple((axis, str(flat[axis])) for axis in axes if axis in flat)


def _line_order(line: Line) -> tuple[str, int, tuple[tuple[str, str], ...]]:
    return (line.method, -1 if line.embed_dim is None else line.embed_dim, line.variant)


def _between(low: float, high: float, share: float) -> float:
    if low <= 0:  # a cost of zero has no logarithm
        return low + share * (high - low)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _sign(goal: str) -> int:
    return -1 if goal == "min" else 1
