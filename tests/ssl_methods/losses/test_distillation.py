from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from ssl_methods.losses.distillation import distillation_loss
from ssl_methods.losses.info_nce import info_nce_loss
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import random_views


def test_d1_squared_distance_of_unit_vectors_is_two_minus_two_cosines() -> None:
    student, teacher = random_views(9, 5)
    cosines = F.cosine_similarity(student, teacher)
    total = 9 * float(distillation_loss(student, teacher))
    assert total == pytest.approx(float((2 - 2 * cosines).sum()), rel=1e-12)
    assert 0 < total < 4 * 9
    assert float(distillation_loss(student, 3 * student)) == pytest.approx(0, abs=1e-30)
    assert float(distillation_loss(student, -student)) == pytest.approx(4, rel=1e-12)


def test_published_total_equals_the_value_worked_out_by_hand() -> None:
    query, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    contrast = info_nce_loss(query, query, other, temperature=0.2).loss
    distances = distillation_loss(query, other), distillation_loss(other, other)
    assert [float(each) for each in distances] == [2, 0]
    assert float(contrast + sum(distances)) == pytest.approx(2.006715348, rel=1e-7)  # fp32


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = (z.requires_grad_() for z in random_views(6, 4))
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None and bool((student.grad.norm(dim=1) > 0).all())
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, fixed), (student,))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    student, teacher = (z.bfloat16() for z in random_views(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(distillation_loss, num_ranks=num_ranks)
