from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.losses.guided import GuidedLoss, guided_loss
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import random_views


def terms_of(student: Tensor, teacher: Tensor, *, temperature: float = 0.2) -> GuidedLoss:
    return guided_loss(student, teacher, temperature=temperature)


def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
    return terms_of(student, teacher).loss


def by_definition(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """One sample and one coordinate at a time."""

    def distribution(row: Tensor) -> list[float]:
        values = [float(x) for x in row]
        length = math.sqrt(sum(x * x for x in values))
        powers = [math.exp(x / length / temperature) for x in values]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for one, other in zip(student, teacher, strict=True):
        pairs = zip(distribution(other), distribution(one), strict=True)
        total -= sum(target * math.log(probability) for target, probability in pairs)
    return total / len(student)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equals_the_definition(temperature: float) -> None:
    student, teacher = random_views(7, 5)
    expected = by_definition(student, teacher, temperature)
    assert float(terms_of(student, teacher, temperature=temperature).loss) == pytest.approx(expected, rel=1e-12)


def test_equals_the_values_worked_out_by_hand() -> None:
    right, up = torch.eye(2, dtype=torch.float64)[:, None]
    assert float(loss_of(right, right)) == pytest.approx(0.040179603, abs=1e-9)
    assert float(loss_of(up, right)) == pytest.approx(4.973251094, abs=1e-9)
    assert float(loss_of(3 * right, 7 * right)) == pytest.approx(0.040179603, abs=1e-9)


def test_random_directions_in_128_dimensions_are_a_fifth_above_the_floor() -> None:
    student, teacher = torch.randn(2, 4096, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = terms_of(student, teacher)
    assert float(terms.loss) == pytest.approx(4.949, abs=0.002)
    assert float(terms.entropy) == pytest.approx(4.755, abs=0.002)


def test_s5_the_floor_is_the_teacher_s_entropy_reached_at_equal_distributions_only() -> None:
    student, teacher = random_views(9, 6)
    terms = terms_of(student, teacher)
    assert float(terms.loss) > float(terms.entropy)
    assert float(terms.divergence) == pytest.approx(float(terms.loss - terms.entropy), rel=1e-9)
    # unit vectors that differ by a constant in all coordinates: mirrored at the plane of mean zero
    mirrored = F.normalize(teacher, dim=1) - 2 * F.normalize(teacher, dim=1).mean(dim=1, keepdim=True)
    for equal in (5 * teacher, mirrored):
        terms = terms_of(equal, teacher)
        assert float(terms.loss) == pytest.approx(float(terms.entropy), rel=1e-12)
        assert float(terms.divergence) == pytest.approx(0, abs=1e-12)


def test_s5_no_gradient_reaches_the_teacher() -> None:
    student, teacher = (z.requires_grad_() for z in random_views(5, 4))
    terms = terms_of(student, teacher)
    terms.loss.backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().max() > 0
    assert not terms.divergence.requires_grad and not terms.entropy.requires_grad


def test_gradient_equals_finite_differences() -> None:
    student, teacher = random_views(5, 4)
    assert torch.autograd.gradcheck(lambda z: loss_of(z, teacher), student.requires_grad_())


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    student, teacher = (z.bfloat16() for z in random_views(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(student.float(), teacher.float()))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_s6_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(loss_of, num_ranks=num_ranks)
