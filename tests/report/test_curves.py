from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrate.report.curves import (
    EMBED_DIM,
    Curve,
    Line,
    Point,
    best_at_largest_budget,
    best_per_method,
    budgets,
    build_baselines,
    build_curves,
    efficiency_ratio,
    gain_per_doubling,
    lines_along,
    number_axes,
    reach,
    spread,
    target_for_gain,
)
from tests.report.conftest import METRIC, FakeSweep


def curve(values: dict[int, float], method: str = "a", dim: int | None = 8, random_init: float = 0.5) -> Curve:
    """A curve with one seed, by {epochs: value}; 10 images and 4 rank-seconds an epoch."""
    points = tuple(
        Point(f"{e}ep", spread([v]), spread([v - random_init]), None, float(e), 10.0 * e, 4.0 * e, 2.0 * e, 1)
        for e, v in values.items()
    )
    return Curve(Line(method, dim), points)


def test_spread_by_hand() -> None:
    found = spread([3.0, 1.0, 2.0])
    assert (found.mean, found.low, found.high, found.std, found.n) == (2.0, 1.0, 3.0, 1.0, 3)


def test_single_seed_has_no_standard_deviation() -> None:
    assert spread([0.7]).std is None


def test_mean_of_equal_numbers_is_that_number() -> None:
    found = spread([0.1, 0.1, 0.1])
    assert found.low == found.mean == found.high == 0.1


def test_seeds_are_averaged_and_dimensions_and_budgets_are_not(sweep: FakeSweep) -> None:
    for dim, budget, seed, value in [(64, 10, 0, 0.6), (64, 10, 1, 0.7), (64, 20, 0, 0.8), (256, 10, 0, 0.65)]:
        sweep.finish(sweep.add("a", dim, budget, seed), value)
    small, large = build_curves(sweep.write().trials, METRIC)
    assert (small.line, large.line) == (Line("a", 64), Line("a", 256))
    assert [(p.budget, p.epochs, p.images, p.rank_seconds, p.train_seconds, p.value.n) for p in small.points] == [
        ("10ep", 10.0, 10_000.0, 40.0, 20.0, 2),
        ("20ep", 20.0, 20_000.0, 80.0, 40.0, 1),
    ]
    assert small.points[0].value.mean == pytest.approx(0.65)  # rounding of a sum
    assert (small.points[0].value.low, small.points[0].value.high) == (0.6, 0.7)


def test_unfinished_seeds_count_as_planned_but_not_in_the_mean(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add(seed=0), 0.6)
    sweep.status(sweep.add(seed=1), "failed")
    sweep.add(seed=2)
    ((point,),) = [found.points for found in build_curves(sweep.write().trials, METRIC)]
    assert (point.value.n, point.num_planned, point.value.mean) == (1, 3, 0.6)


def test_margins_are_paired_by_trial(sweep: FakeSweep) -> None:
    for seed, value, random_init in [(0, 0.8, 0.5), (1, 0.7, 0.6)]:
        sweep.finish(sweep.add(seed=seed), value, metrics={f"random_init/{METRIC}": random_init})
    ((point,),) = [found.points for found in build_curves(sweep.write().trials, METRIC)]
    assert point.over_random_init is not None
    assert point.over_raw_pixels is not None
    rounded = [round(x, 12) for x in (point.over_random_init.low, point.over_random_init.high)]
    assert rounded == [0.1, 0.3]
    assert point.over_random_init.mean == pytest.approx(0.2)
    assert point.over_raw_pixels.mean == pytest.approx(0.0)  # 0.05 and -0.05


def test_margin_is_none_without_the_baseline(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add(), 0.8, metrics={f"random_init/{METRIC}": None, f"raw_pixels/{METRIC}": None})
    trials = sweep.write().trials
    ((point,),) = [found.points for found in build_curves(trials, METRIC)]
    assert (point.over_random_init, point.over_raw_pixels) == (None, None)
    assert build_baselines(trials, METRIC) == ()


def test_another_swept_axis_is_a_line_of_its_own_and_not_a_spread(sweep: FakeSweep) -> None:
    for lr, value in [(0.1, 0.6), (0.2, 0.8)]:
        sweep.finish(sweep.add(optim__lr=lr), value)
    found = build_curves(sweep.write().trials, METRIC)
    assert [c.line.variant for c in found] == [(("optim.lr", "0.1"),), (("optim.lr", "0.2"),)]
    assert [c.last.value.n for c in found] == [1, 1]


def test_axis_that_follows_from_method_and_dimension_is_no_variant(sweep: FakeSweep) -> None:
    for dim, lr in [(64, 0.1), (256, 0.2)]:
        sweep.finish(sweep.add("a", dim, optim__lr=lr), 0.6)
    assert [c.line.variant for c in build_curves(sweep.write().trials, METRIC)] == [(), ()]


def test_method_without_dimension_has_a_curve(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add("supervised", None), 0.9)
    (found,) = build_curves(sweep.write().trials, METRIC)
    assert found.line == Line("supervised", None)


def test_baselines_are_per_backbone_and_raw_pixels_have_none(sweep: FakeSweep) -> None:
    for seed, backbone, value in [(0, "resnet18", 0.3), (1, "resnet18", 0.4), (0, "vit", 0.2)]:
        trial = sweep.add(seed=seed, backbone__name=backbone)
        sweep.finish(trial, 0.8, metrics={f"random_init/{METRIC}": value})
    found = build_baselines(sweep.write().trials, METRIC)
    assert [(b.encoder, b.backbone, b.value.n) for b in found] == [
        ("random_init", "resnet18", 2), ("random_init", "vit", 1), ("raw_pixels", "", 3),
    ]  # fmt: skip
    assert (found[0].value.low, found[0].value.high, found[2].value.mean) == (0.3, 0.4, 0.75)


def test_budgets_are_ordered_by_epochs_and_not_by_name() -> None:
    assert budgets([curve({100: 0.6, 25: 0.5}), curve({5: 0.4})]) == ("5ep", "25ep", "100ep")


def test_lines_along_a_swept_number_differ_in_nothing_else() -> None:
    def varied(method: str, dim: int, **variant: str) -> Curve:
        return replace(curve({10: 0.5}), line=Line(method, dim, tuple(sorted(variant.items()))))

    lr = {"1.0": varied("a", 8, lr="1.0", kind="x"), "0.5": varied("a", 8, lr="0.5", kind="x")}
    others = [varied("a", 8, lr="1.0", kind="y"), varied("b", 8), varied("b", 16), varied("c", 8, lr="fast")]
    curves = [*lr.values(), *others]
    assert number_axes(curves) == (EMBED_DIM, "lr")
    along = lines_along(curves, "lr")
    assert list(along[Line("a", 8, (("kind", "x"),))].items()) == [(0.5, lr["0.5"]), (1.0, lr["1.0"])]
    assert [line.method for line in along] == ["a", "a"]
    assert list(lines_along(curves, EMBED_DIM)[Line("b", None)]) == [8.0, 16.0]
    assert number_axes(others[:1]) == ()


def test_best_is_taken_at_the_largest_budget_only() -> None:
    early, late = curve({10: 0.9, 20: 0.7}, "early"), curve({10: 0.5, 20: 0.8}, "late")
    best = best_at_largest_budget([early, late], "max")
    assert best == (late, late.last)
    worst = best_at_largest_budget([early, late], "min")
    assert worst == (early, early.last)


def test_no_best_without_curves() -> None:
    assert best_at_largest_budget([], "max") is None


def test_best_per_method_keeps_one_dimension_of_each() -> None:
    small, large, other = curve({10: 0.6}, "a", 8), curve({10: 0.7}, "a", 16), curve({10: 0.2}, "b")
    assert best_per_method([small, large, other], "max") == (large, other)


def test_target_for_gain_by_hand() -> None:
    # Best mean 0.8, 0.3 above the random-init encoder: 90 % of the gain is at 0.5 + 0.27.
    assert target_for_gain([curve({10: 0.6, 20: 0.8})], 0.9, goal="max") == pytest.approx(0.77)


def test_target_for_gain_of_a_loss_by_hand() -> None:
    # 2.0 at random init, 1.0 at best: half of the gain is at 1.5.
    assert target_for_gain([curve({10: 1.0}, random_init=2.0)], 0.5, goal="min") == pytest.approx(1.5)


def test_no_target_where_nothing_beats_the_random_init_encoder() -> None:
    assert target_for_gain([curve({10: 0.4})], 0.9, goal="max") is None
    assert target_for_gain([], 0.9, goal="max") is None


def test_epochs_to_target_are_interpolated_on_a_logarithmic_scale() -> None:
    # Half way from 0.6 to 0.8 lies half way from log 10 to log 40: at 20.
    found = reach(curve({10: 0.6, 40: 0.8}), 0.7, goal="max")
    assert found.kind == "exact"
    assert found.cost == pytest.approx(20.0)


def test_compute_to_target_uses_the_named_cost() -> None:
    assert reach(curve({10: 0.6, 40: 0.8}), 0.7, goal="max", cost="rank_seconds").cost == pytest.approx(80.0)


def test_first_crossing_counts_where_a_curve_falls_again() -> None:
    found = reach(curve({1: 0.5, 4: 0.7, 16: 0.6, 64: 0.9}), 0.6, goal="max")
    assert found.cost == pytest.approx(2.0)


def test_target_at_the_smallest_budget_is_a_bound() -> None:
    found = reach(curve({10: 0.6, 40: 0.8}), 0.55, goal="max")
    assert (found.kind, found.cost) == ("at most", 10.0)


def test_target_above_the_curve_is_not_reached() -> None:
    found = reach(curve({10: 0.6, 40: 0.8}), 0.81, goal="max")
    assert (found.kind, found.cost) == ("not reached", 40.0)


def test_reach_of_a_loss_goes_downwards() -> None:
    assert reach(curve({10: 3.0, 40: 1.0}), 2.0, goal="min").cost == pytest.approx(20.0)


def test_efficiency_ratio_by_hand() -> None:
    # The other has 0.7 after 40 epochs, the leader after 20.
    found = efficiency_ratio(curve({10: 0.6, 40: 0.8}), curve({10: 0.5, 40: 0.7}), goal="max")
    assert found is not None
    assert found.is_exact
    assert [found.factor, found.leader_epochs, found.other_epochs] == pytest.approx([2.0, 20.0, 40.0])
    assert found.target == 0.7


def test_efficiency_ratio_is_a_bound_where_the_leader_starts_above() -> None:
    found = efficiency_ratio(curve({10: 0.75, 40: 0.8}), curve({10: 0.5, 40: 0.7}), goal="max")
    assert found is not None
    assert not found.is_exact
    assert found.factor == pytest.approx(4.0)


@pytest.mark.parametrize(
    "other",
    [curve({10: 0.5, 40: 0.9}), curve({10: 0.7, 40: 0.6}), curve({40: 0.7})],
    ids=["better than the leader ever is", "best at its smallest budget", "one budget"],
)
def test_no_efficiency_ratio_where_it_is_not_defined(other: Curve) -> None:
    assert efficiency_ratio(curve({10: 0.6, 40: 0.8}), other, goal="max") is None


def test_gain_per_doubling_by_hand() -> None:
    assert gain_per_doubling(curve({5: 0.5, 10: 0.9, 20: 0.7})) == pytest.approx(0.1)
    assert gain_per_doubling(curve({5: 0.5})) is None


def test_interpolation_takes_a_cost_of_zero() -> None:
    assert math.isclose(reach(curve({0: 0.5, 10: 0.7}), 0.6, goal="max").cost, 5.0)
