from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssl_methods.losses.negative_cosine import negative_cosine_loss
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import closed_views, random_views


def by_definition(predictions: Tensor, targets: Tensor) -> float:
    """Equation 1 of SimSiam, one number at a time."""
    total = 0.0
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        product = sum(a * b for a, b in zip(prediction, target, strict=True))
        total -= product / math.hypot(*prediction) / math.hypot(*target)
    return total / len(predictions)


def test_equals_the_definition() -> None:
    z1, z2 = random_views(7, 5)
    assert float(negative_cosine_loss(z1, z2)) == pytest.approx(by_definition(z1, z2), rel=1e-12)


def test_equals_an_independent_library_on_the_closed_fixture() -> None:
    assert float(negative_cosine_loss(*closed_views())) == pytest.approx(-0.9772449, rel=1e-6)  # fp32, seven digits


def test_is_a_squared_distance_of_unit_vectors() -> None:
    z1, z2 = random_views(7, 5)
    unit1, unit2 = (z / z.norm(dim=1, keepdim=True) for z in (z1, z2))
    distance = (unit1 - unit2).square().sum(dim=1).mean()
    assert float(2 + 2 * negative_cosine_loss(z1, z2)) == pytest.approx(float(distance), rel=1e-12)


def test_bounds_are_equal_and_opposite_directions() -> None:
    z, _ = random_views(6, 4)
    assert float(negative_cosine_loss(z, 3 * z)) == pytest.approx(-1, rel=1e-12)
    assert float(negative_cosine_loss(z, -0.1 * z)) == pytest.approx(1, rel=1e-12)


def test_target_gets_no_gradient() -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(6, 4))
    negative_cosine_loss(z1, z2).backward()
    assert z1.grad is not None and bool((z1.grad != 0).all())
    assert z2.grad is None


def test_gradient_equals_finite_differences() -> None:
    z1, z2 = random_views(5, 4)
    assert torch.autograd.gradcheck(lambda z: negative_cosine_loss(z, z2), (z1.requires_grad_(),))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    z1, z2 = (z.bfloat16() for z in random_views(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = negative_cosine_loss(z1, z2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, negative_cosine_loss(z1.float(), z2.float()))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(negative_cosine_loss, num_ranks=num_ranks)
