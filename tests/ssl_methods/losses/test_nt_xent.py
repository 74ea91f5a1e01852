from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from ssl_methods.losses.nt_xent import nt_xent_loss
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import closed_views, random_views

loss_of = partial(nt_xent_loss, temperature=0.5)


def by_definition(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, averaged over all ordered positive pairs."""
    rows = [[float(x) for x in row] for row in [*z1, *z2]]
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]

    def weight(i: int, j: int) -> float:
        return math.exp(sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) / temperature)

    num_rows = len(rows)
    total = 0.0
    for i in range(num_rows):
        positive = (i + len(z1)) % num_rows
        total -= math.log(weight(i, positive) / sum(weight(i, j) for j in range(num_rows) if j != i))
    return total / num_rows


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_equals_the_definition(temperature: float) -> None:
    z1, z2 = random_views(7, 5)
    loss = nt_xent_loss(z1, z2, temperature=temperature)
    assert float(loss) == pytest.approx(by_definition(z1, z2, temperature), rel=1e-12)  # float64, other order of sums


def test_equals_an_independent_library_on_the_closed_fixture() -> None:
    assert float(loss_of(*closed_views())) == pytest.approx(1.9714299, rel=1e-6)  # fp32, number given to eight digits


def test_scale_rotation_and_order_do_not_matter() -> None:
    z1, z2 = random_views(8, 6)
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    lengths = 0.1 + torch.rand(8, 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(8, generator=generator)
    loss = float(loss_of(z1, z2))
    assert float(loss_of(z1 * lengths, z2 * 7)) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z1 @ rotation, z2 @ rotation)) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z1[order], z2[order])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z2, z1)) == pytest.approx(loss, rel=1e-12)


def test_collapsed_embeddings_cost_a_uniform_guess() -> None:
    z = torch.ones(8, 4, dtype=torch.float64)
    assert float(loss_of(z, z)) == pytest.approx(math.log(15))


def test_gradient_equals_finite_differences() -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(5, 4))
    assert torch.autograd.gradcheck(loss_of, (z1, z2))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    z1, z2 = (z.bfloat16() for z in random_views(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(z1, z2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(z1.float(), z2.float()))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(loss_of, num_ranks=num_ranks)
