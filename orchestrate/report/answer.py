"""The answer in words: which method is best at the largest budget, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrate.report import wording
from orchestrate.report.curves import (
    Curve,
    Point,
    Spread,
    best_at_largest_budget,
    best_per_method,
    dimensions,
    gain_per_doubling,
    reach,
    target_for_gain,
)
from orchestrate.report.queries import CLOSED, Sweep
from orchestrate.report.wording import Metric


@dataclass(frozen=True)
class Fact:
    """A number that stands for itself, and what it is."""

    number: str
    meaning: str


def answer(sweep: Sweep, curves: Sequence[Curve]) -> str:
    """Say in one sentence which method is best at the largest finished budget, and its margins over the baselines."""
    best = best_at_largest_budget(curves, sweep.objective.goal)
    if best is None:
        return f"No trial has {sweep.objective.metric} yet; the table of trials says where each of them stands."
    (curve, point), metric = best, Metric(sweep.objective.metric)
    is_final = all(trial.state in CLOSED for trial in sweep.trials)
    when = f"{'After' if is_final else 'So far, after'} {wording.budget_name(point.budget)},"
    dim = curve.line.embed_dim
    settings = [] if dim is None else [f"embedding dimension {dim}"]
    settings += wording.variant_names(curve.line)
    name = curve.line.method + (f" with {', '.join(settings)}" if settings else "")
    is_alone = len({other.line.method for other in curves if other.at(point.budget)}) == 1
    claim = f"{'reaches' if is_alone else 'is best:'} {metric.value(point.value.mean)} {metric.label}"
    return f"{when} {name} {claim}{_margins(point, metric)}."


def evidence(sweep: Sweep, curves: Sequence[Curve]) -> str:
    """Say what the answer rests on: protocol, seeds, and whether they tell the best method from the next one."""
    best = best_at_largest_budget(curves, sweep.objective.goal)
    if best is None:
        return ""
    curve, point = best
    metric = Metric(sweep.objective.metric)
    basis = f"Measured by {metric.probe or metric.key} on frozen features, {_seeds(point.value, metric)}."
    others = [other for other in curves if other.line.method != curve.line.method and other.at(point.budget)]
    second = best_at_largest_budget(others, sweep.objective.goal)
    if second is None:
        return basis
    next_value = second[1].value
    rival = f"Next comes {_name(second[0], curves)} with {metric.value(next_value.mean)}"
    if point.value.n == 1 or next_value.n == 1:
        return f"{basis} {rival}; with a single seed their order may be chance."
    if point.value.low <= next_value.high and next_value.low <= point.value.high:
        return f"{basis} {rival}; the two ranges over seeds overlap, so their order may be chance."
    return f"{basis} {rival}; the two ranges over seeds do not overlap."


def facts(sweep: Sweep, curves: Sequence[Curve]) -> tuple[Fact, ...]:
    """Give the few numbers at the head of the page."""
    found = []
    if (best := best_at_largest_budget(curves, sweep.objective.goal)) is not None:
        found += _curve_facts(*best, curves, sweep)
    if spent := sum(trial.spent_rank_seconds for trial in sweep.trials):
        found.append(Fact(wording.duration(spent), f"compute spent: {wording.RANK_TIME}, lost attempts too"))
    num_done = sum(trial.is_done for trial in sweep.trials)
    return (*found, Fact(f"{num_done} of {len(sweep.trials)}", "trials done"))


def _curve_facts(curve: Curve, point: Point, curves: Sequence[Curve], sweep: Sweep) -> list[Fact]:
    goal, metric, name = sweep.objective.goal, Metric(sweep.objective.metric), _name(curve, curves)
    unit = metric.margin_unit.strip()
    found = []
    if point.over_random_init:
        text = f"{unit} over the random-init encoder after {wording.budget_name(point.budget)}, {name}"
        found.append(Fact(metric.margin(point.over_random_init.mean), text.strip()))
    if (gain := gain_per_doubling(curve)) is not None:
        found.append(Fact(metric.margin(gain), f"{unit} per doubling of the epochs, {name}".strip()))
    target = target_for_gain(curves, 0.9, goal=goal)
    reached = [] if target is None else [(reach(c, target, goal=goal), c) for c in best_per_method(curves, goal)]
    able = [(r.cost, r.kind, c) for r, c in reached if r.kind != "not reached"]
    if able:
        cost, kind, first = min(able, key=lambda item: item[0])
        bound = "≤\N{NO-BREAK SPACE}" if kind == "at most" else ""
        text = f"epochs to 90 % of the best gain, {_name(first, curves)}"
        found.append(Fact(bound + (wording.epochs(cost) if bound else f"{cost:.1f}"), text))
    return found


def _name(curve: Curve, curves: Sequence[Curve]) -> str:
    return wording.line_name(curve.line, with_dim=len(dimensions(curves)) > 1)


def _margins(point: Point, metric: Metric) -> str:
    pairs = ((point.over_random_init, "the random-init encoder"), (point.over_raw_pixels, "raw pixels"))
    parts = [_margin(margin, name, metric) for margin, name in pairs if margin]
    return ", " + " and ".join(parts) if parts else ""


def _margin(margin: Spread, name: str, metric: Metric) -> str:
    side = "above" if margin.mean >= 0 else "below"
    return f"{metric.margin(abs(margin.mean)).lstrip('+')}{metric.margin_unit} {side} {name}"


def _seeds(value: Spread, metric: Metric) -> str:
    if value.n == 1:
        return "one seed"
    return f"mean of {value.n} seeds from {metric.number(value.low)} to {metric.value(value.high)}"
