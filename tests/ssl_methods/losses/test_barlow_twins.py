from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_methods.collectives import standardise, world_size
from ssl_methods.losses.barlow_twins import barlow_twins_loss, sampling_floor
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import assert_ranks_equal_one_process, value_and_gradient
from tests.ssl_methods.inputs import closed_views, hadamard, random_views

EPSILON = 1e-5
# correlations of features; products of samples, which the loss chooses for itself
SHAPES = {"many samples": (9, 5), "many features": (4, 11)}


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
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_definition(shape: tuple[int, int], off_diagonal: float) -> None:
    z1, z2 = random_views(*shape)
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


def test_b1_equal_views_with_orthogonal_features_cost_nothing() -> None:
    z = hadamard(64)[:, 1:33]
    assert float(loss_of(z, z)) == pytest.approx(32 * (EPSILON / (1 + EPSILON)) ** 2, rel=1e-6)
    z = torch.cat([z[:, :31], z[:, 30:31]], dim=1)  # one feature twice
    assert float(loss_of(z, z)) == pytest.approx(2 * 0.0051, rel=1e-4)  # epsilon


def test_b2_opposite_views_cost_four_a_feature() -> None:
    z = hadamard(64)[:, 1:33]
    assert float(loss_of(z, -z)) == pytest.approx(32 * (2 - EPSILON) ** 2, rel=1e-8)  # 127.999


def test_b3_independent_views_cost_one_a_feature_and_the_sampling_floor() -> None:
    dim, num_samples = 16, 64
    draws = torch.randn(200, 2, num_samples, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.stack([loss_of(z1, z2) for z1, z2 in draws]).mean()
    expected = dim + dim / (num_samples - 1) + sampling_floor(dim, num_samples)
    assert float(mean) == pytest.approx(expected, rel=0.01)  # 200 draws: standard error 0.4 %


def test_b4_scale_offset_and_order_do_not_matter() -> None:
    z1, z2 = random_views(12, 6)
    generator = torch.Generator().manual_seed(3)
    scale = 2 + torch.rand(6, generator=generator, dtype=torch.float64)
    samples, features = torch.randperm(12, generator=generator), torch.randperm(6, generator=generator)
    loss = float(loss_of(z1, z2))
    assert float(loss_of(z1 * scale + 5, z2 - scale)) == pytest.approx(loss, rel=1e-4)  # epsilon is not scaled
    assert float(loss_of(z1[samples], z2[samples])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z1[:, features], z2[:, features])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z2, z1)) == pytest.approx(loss, rel=1e-12)


def test_b5_collapsed_embeddings_cost_one_a_feature_and_stay_finite() -> None:
    z = torch.ones(8, 5, dtype=torch.float64, requires_grad=True)
    loss = loss_of(z, z)
    loss.backward()
    assert loss.item() == 5
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_b6_diagonal_and_the_rest_are_counted_once() -> None:
    signal = hadamard(8)[:, 1:2].repeat(1, 5)
    terms = barlow_twins_loss(signal, signal, off_diagonal=1.0)
    assert float(terms.invariance) == pytest.approx(0, abs=1e-8)
    assert float(terms.redundancy) == pytest.approx(5 * 4, rel=3 * EPSILON)
    opposite = barlow_twins_loss(signal, -signal, off_diagonal=1.0)
    assert float(opposite.invariance) == pytest.approx(5 * 4, rel=3 * EPSILON)
    assert float(opposite.redundancy) == pytest.approx(5 * 4, rel=3 * EPSILON)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_equals_finite_differences(shape: tuple[int, int]) -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(*shape))
    assert torch.autograd.gradcheck(loss_of, (z1, z2))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    z1, z2 = (z.bfloat16() for z in random_views(32, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(z1, z2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(z1.float(), z2.float()))


def test_b9_mean_over_micro_batches_is_another_loss() -> None:
    z1, z2 = random_views(16, 5)
    halves = (loss_of(z1[:8], z2[:8]) + loss_of(z1[8:], z2[8:])) / 2
    assert float(halves) != pytest.approx(float(loss_of(z1, z2)), rel=0.02)


def narrow_and_wide(z1: Tensor, z2: Tensor) -> Tensor:
    """Both ways to the redundancy in one loss: of 5 features, and of 40 for 16 samples."""
    widened = (torch.cat([torch.sin(step * z) for step in range(1, 9)], dim=1) for z in (z1, z2))
    return loss_of(z1, z2) + loss_of(*widened)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_b7_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(narrow_and_wide, num_ranks=num_ranks)


def test_b7_authors_all_reduce_divides_the_gradient_by_the_rank_count() -> None:
    _, exact = value_and_gradient(loss_of)
    results = run_on_ranks(4, value_and_gradient, _loss_with_authors_all_reduce)
    average = torch.stack([gradient for _, gradient in results]).mean(0)
    torch.testing.assert_close(average, exact / 4, rtol=1e-9, atol=1e-12)


def _loss_with_authors_all_reduce(z1: Tensor, z2: Tensor) -> Tensor:
    """The exact standardisation, but the sum of the correlation hidden from autograd."""
    first, second = standardise(z1, epsilon=EPSILON), standardise(z2, epsilon=EPSILON)
    correlation = first.T @ second / (len(z1) * world_size())
    dist.all_reduce(correlation.data)
    assert world_size() > 1
    off_diagonal = 1 - torch.eye(len(correlation), dtype=correlation.dtype)
    return (1 - correlation.diagonal()).square().sum() + 0.0051 * (off_diagonal * correlation.square()).sum()
