from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_methods.collectives import world_size
from ssl_methods.losses.barlow_twins import barlow_twins_loss, sampling_floor
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import assert_ranks_equal_one_process, value_and_gradient
from tests.ssl_methods.inputs import closed_views, hadamard, random_views

EPSILON = 1e-5


def loss_of(z1: Tensor, z2: Tensor) -> Tensor:
    return barlow_twins_loss(z1, z2, off_diagonal=0.0051).loss


def by_definition(z1: Tensor, z2: Tensor, off_diagonal: float) -> float:
    """Equations 1 and 2 of the paper, one number at a time."""
    num_samples, dim = z1.shape

    def column(z: Tensor, feature: int) -> list[float]:
        values = [float(z[sample, feature]) for sample in range(num_samples)]
        mean = sum(values) / num_samples
        variance = sum((value - mean) ** 2 for value in values) / num_samples
        return [(value - mean) / math.sqrt(variance + EPSILON) for value in values]

    total = 0.0
    for i in range(dim):
        for j in range(dim):
            products = zip(column(z1, i), column(z2, j), strict=True)
            correlation = sum(a * b for a, b in products) / num_samples
            total += (1 - correlation) ** 2 if i == j else off_diagonal * correlation**2
    return total


@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_equals_the_definition(off_diagonal: float) -> None:
    z1, z2 = random_views(9, 5)
    loss = barlow_twins_loss(z1, z2, off_diagonal=off_diagonal).loss
    assert float(loss) == pytest.approx(by_definition(z1, z2, off_diagonal), rel=1e-12)  # float64, other order of sums


def test_equals_an_independent_library_on_the_closed_fixture() -> None:
    loss = barlow_twins_loss(*closed_views(), off_diagonal=5e-3).loss
    assert float(loss) == pytest.approx(0.7791002, rel=1e-6)  # fp32, number given to seven digits


def test_equals_the_value_worked_out_by_hand() -> None:
    z1 = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    z2 = z1[:, :1].repeat(1, 2)
    terms = barlow_twins_loss(z1, z2, off_diagonal=0.0051)
    # correlation [[1, 1], [0, 0]] up to the epsilon inside the standard deviation
    assert float(terms.loss) == pytest.approx(1.0051, abs=3 * EPSILON)
    assert float(terms.invariance) == pytest.approx(1, abs=3 * EPSILON)
    assert float(terms.redundancy) == pytest.approx(1, abs=3 * EPSILON)


def test_equal_orthogonal_views_cost_nothing_and_opposite_ones_four_a_feature() -> None:
    z = hadamard(64)[:, 1:33]
    same, opposite = loss_of(z, z), loss_of(z, -z)
    assert float(same) == pytest.approx(32 * (EPSILON / (1 + EPSILON)) ** 2, rel=1e-6)
    assert float(opposite) == pytest.approx(32 * (2 - EPSILON) ** 2, rel=1e-8)  # 4 D up to epsilon


def test_independent_views_cost_one_a_feature_and_the_sampling_floor() -> None:
    dim, num_samples = 16, 64
    draws = torch.randn(200, 2, num_samples, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.stack([loss_of(z1, z2) for z1, z2 in draws]).mean()
    expected = dim + dim / (num_samples - 1) + sampling_floor(dim, num_samples)
    assert float(mean) == pytest.approx(expected, rel=0.01)  # 200 draws: standard error 0.4 %


def test_scale_offset_and_order_do_not_matter() -> None:
    z1, z2 = random_views(12, 6)
    generator = torch.Generator().manual_seed(3)
    scale = 2 + torch.rand(6, generator=generator, dtype=torch.float64)
    samples, features = torch.randperm(12, generator=generator), torch.randperm(6, generator=generator)
    loss = float(loss_of(z1, z2))
    assert float(loss_of(z1 * scale + 5, z2 - scale)) == pytest.approx(loss, rel=1e-4)  # epsilon is not scaled
    assert float(loss_of(z1[samples], z2[samples])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z1[:, features], z2[:, features])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z2, z1)) == pytest.approx(loss, rel=1e-12)


def test_collapsed_embeddings_cost_one_a_feature_and_stay_finite() -> None:
    z = torch.ones(8, 5, dtype=torch.float64, requires_grad=True)
    loss = loss_of(z, z)
    loss.backward()
    assert loss.item() == 5
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_redundancy_counts_every_off_diagonal_entry() -> None:
    signal = hadamard(8)[:, 1:2].repeat(1, 5)
    terms = barlow_twins_loss(signal, signal, off_diagonal=1.0)
    assert float(terms.invariance) == pytest.approx(0, abs=1e-8)
    assert float(terms.redundancy) == pytest.approx(5 * 4, rel=3 * EPSILON)


def test_gradient_equals_finite_differences() -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(6, 3))
    assert torch.autograd.gradcheck(loss_of, (z1, z2))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    z1, z2 = (z.bfloat16() for z in random_views(32, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(z1, z2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(z1.float(), z2.float()))


def test_mean_over_micro_batches_is_another_loss() -> None:
    z1, z2 = random_views(16, 5)
    halves = (loss_of(z1[:8], z2[:8]) + loss_of(z1[8:], z2[8:])) / 2
    assert float(halves) != pytest.approx(float(loss_of(z1, z2)), rel=0.02)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(loss_of, num_ranks=num_ranks)


def test_authors_all_reduce_divides_the_gradient_by_the_rank_count() -> None:
    _, exact = value_and_gradient(loss_of)
    results = run_on_ranks(4, value_and_gradient, _loss_with_authors_all_reduce)
    average = torch.stack([gradient for _, gradient in results]).mean(0)
    torch.testing.assert_close(average, exact / 4, rtol=1e-9, atol=1e-12)


def _loss_with_authors_all_reduce(z1: Tensor, z2: Tensor) -> Tensor:
    """The exact standardisation, but the sum of the correlation hidden from autograd."""
    from ssl_methods.losses.barlow_twins import _standardise

    standardised, count = _standardise(torch.cat([z1, z2], dim=1))
    first, second = standardised.chunk(2, dim=1)
    correlation = first.T @ second / count
    dist.all_reduce(correlation.data)
    assert world_size() > 1
    off_diagonal = 1 - torch.eye(len(correlation), dtype=correlation.dtype)
    return (1 - correlation.diagonal()).square().sum() + 0.0051 * (off_diagonal * correlation.square()).sum()
