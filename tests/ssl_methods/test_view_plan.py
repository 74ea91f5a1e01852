"""What is decided about a view: crops as torchvision draws them, and when a fresh draw is needed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from ssl_methods.randomness import uniforms
from ssl_methods.view_plan import ViewSpec, largest_box, plan_view, random_box

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10


@settings(max_examples=50)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_crop_lies_inside_the_image(width: int, height: int, draws: list[float]) -> None:
    for box in (
        random_box((width, height), scale=SCALE, ratio=RATIO, draws=draws),
        largest_box((width, height), ratio=RATIO),
    ):
        if box is not None:
            left, top, right, bottom = box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(28, 28), (40, 30), (200, 20), (15, 200)])
def test_crop_equals_torchvision_given_the_same_draws(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scale = (0.3, 1.0)
    draws = np.random.default_rng(5).random(4 * TRIES).tolist()
    # torchvision asks for area and ratio, and, only once these fit, for top and left
    tries = iter(draws[start : start + 4] for start in range(0, len(draws), 4))
    current: list[float] = []

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        if not current or len(current) == 2:
            current[:] = next(tries)
        return torch.tensor([low + (high - low) * current.pop(0)], dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([low + int(current.pop(0) * (high - low))])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", randint)
    top, left, height, width = RandomResizedCrop.get_params(Image.new("L", size), list(scale), list(RATIO))
    box = random_box(size, scale=scale, ratio=RATIO, draws=draws) or largest_box(size, ratio=RATIO)
    assert box == (left, top, left + width, top + height)


@pytest.mark.parametrize("size", [(28, 28), (500, 375), (90, 30), (300, 30)])
def test_plan_takes_the_first_crop_of_ten_tries_that_fits(size: tuple[int, int]) -> None:
    spec = ViewSpec(crop_scale=(0.3, 1.0))
    tries_needed = set()
    for sample_id in range(300):
        draws = uniforms(3, epoch=1, sample_id=sample_id, view=2, count=11 + 4 * TRIES)[11:]
        fits = [
            random_box(size, scale=spec.crop_scale, ratio=RATIO, draws=draws[start : start + 4])
            for start in range(0, 4 * TRIES, 4)
        ]
        expected = next(filter(None, fits), largest_box(size, ratio=RATIO))
        assert plan_view(spec, size, seed=3, epoch=1, sample_id=sample_id, view=2).box == expected
        tries_needed.add(next((number for number, box in enumerate(fits) if box), TRIES))
    assert size != (90, 30) or max(tries_needed) > 3  # a long image needs more than the usual tries


def test_crop_of_an_impossible_shape_is_the_largest_centred_one() -> None:
    spec = ViewSpec(crop_scale=(1.0, 1.0))
    assert plan_view(spec, (300, 30), seed=0, epoch=0, sample_id=0, view=0).box == (130, 0, 170, 30)


def test_crop_areas_are_uniform() -> None:
    draws = np.random.default_rng(0).random((2000, 40)).tolist()
    boxes = [random_box((1000, 1000), scale=(0.1, 0.5), ratio=(0.99, 1.01), draws=each) for each in draws]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) / 1e6 for box in boxes if box]
    assert len(areas) == 2000
    assert float(np.mean(areas)) == pytest.approx(0.3, abs=4 * 0.4 / math.sqrt(12 * 2000))  # four standard errors


def test_strengths_of_nothing_leave_no_steps() -> None:
    spec = ViewSpec(crop_scale=SCALE, jitter_p=1.0, brightness=0.4)
    plans = [plan_view(spec, (30, 30), seed=0, epoch=0, sample_id=i, view=0) for i in range(20)]
    assert {len(plan.steps) for plan in plans} == {1}
    none = plan_view(replace(spec, jitter_p=0.0), (30, 30), seed=0, epoch=0, sample_id=0, view=0)
    assert (none.steps, none.grey, none.blur_sigma, none.solarise) == ((), False, 0.0, False)
