from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_methods.method import Progress
from ssl_methods.schedules import cosine, linear

NUMBERS = st.floats(-10, 10)


@pytest.mark.parametrize(
    ("epoch", "momentum", "weight_decay"), [(0, 0.996, 0.04), (10, 0.99601, 0.041), (150, 0.998, 0.22), (299, 1, 0.4)]
)
def test_cosine_hits_the_published_values_over_300_epochs(epoch: int, momentum: float, weight_decay: float) -> None:
    # EsViT's and DINO's; given to 5 and 3 digits
    assert cosine(0.996, 1.0, progress=epoch / 300) == pytest.approx(momentum, abs=5e-6)
    assert cosine(0.04, 0.4, progress=epoch / 300) == pytest.approx(weight_decay, abs=5e-4)


@pytest.mark.parametrize(("epoch", "temperature"), [(0, 0.04), (10, 0.05), (15, 0.055), (30, 0.07), (100, 0.07)])
def test_linear_stops_at_its_end(epoch: int, temperature: float) -> None:
    assert linear(0.04, 0.07, progress=epoch / 30) == pytest.approx(temperature, rel=1e-12)


@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_both_schedules_begin_and_end_where_told_and_stay_between(start: float, end: float, progress: float) -> None:
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9  # rounding
    for schedule in (cosine, linear):
        assert schedule(start, end, progress=0.0) == pytest.approx(start, abs=1e-9)
        assert schedule(start, end, progress=1.0) == pytest.approx(end, abs=1e-9)
        assert low <= schedule(start, end, progress=progress) <= high
        assert schedule(start, end, progress=-3.0) == schedule(start, end, progress=0.0)
        assert schedule(start, end, progress=3.0) == schedule(start, end, progress=1.0)


def test_progress_counts_the_steps_that_are_done() -> None:
    before, after = (Progress(step=step, total_steps=40, steps_per_epoch=4.0) for step in (0, 40))
    assert (before.fraction, before.epochs) == (0.0, 0.0)
    assert (after.fraction, after.epochs) == (1.0, 10.0)
