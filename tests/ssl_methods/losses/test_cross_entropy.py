from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.cross_entropy import cross_entropy_loss
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import random_views, rank_slice

LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_the_definition(label_smoothing: float) -> None:
    logits, _ = random_views(7, 4)
    total = 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        target = [label_smoothing / 4 + (1 - label_smoothing) * (i == label) for i in range(4)]
        total -= sum(t * (x - log_sum) for t, x in zip(target, row, strict=True))
    loss = cross_entropy_loss(logits, LABELS, label_smoothing=label_smoothing)
    assert float(loss) == pytest.approx(total / 7, rel=1e-12)  # float64, other order of sums


def test_gradient_equals_finite_differences() -> None:
    logits, _ = random_views(7, 4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, LABELS), (logits.requires_grad_(),))


def value_and_gradient() -> tuple[Tensor, Tensor]:
    inputs, _ = random_views(7, 5)
    weight = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).requires_grad_()
    mine, labels = (rank_slice(x, rank(), world_size()) for x in (inputs, LABELS))
    value = cross_entropy_loss(mine @ weight, labels)
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_with_unequal_batches_equal_one_process(num_ranks: int) -> None:
    value, gradient = value_and_gradient()
    results = run_on_ranks(num_ranks, value_and_gradient)
    assert all(float(each) == pytest.approx(float(value), rel=1e-12) for each, _ in results)
    average = torch.stack([each for _, each in results]).mean(0)
    torch.testing.assert_close(average, gradient, rtol=1e-10, atol=1e-13)
