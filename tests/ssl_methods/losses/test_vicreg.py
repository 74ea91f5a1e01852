from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from ssl_methods.losses.vicreg import VicregLoss, vicreg_loss
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import closed_views, hadamard, random_views

EPSILON = 1e-4
# covariances of features; products of samples, which the loss chooses for itself
SHAPES = {"many samples": (9, 5), "many features": (4, 11)}


def loss_of(z1: Tensor, z2: Tensor) -> Tensor:
    return vicreg_loss(z1, z2).loss


def by_definition(z1: Tensor, z2: Tensor) -> tuple[float, float, float]:
    """Invariance, variance and covariance of equations 1-5, averaged as in the authors' code, a number at a time."""
    num_samples, dim = z1.shape
    invariance = sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist(), strict=True))
    variance = covariance = 0.0
    for z in (z1, z2):
        columns = [column.tolist() for column in z.T]
        centred = [[value - sum(column) / num_samples for value in column] for column in columns]
        for i in range(dim):
            for j in range(dim):
                entry = sum(a * b for a, b in zip(centred[i], centred[j], strict=True)) / (num_samples - 1)
                if i == j:
                    variance += max(0.0, 1 - math.sqrt(entry + EPSILON)) / dim / 2
                else:
                    covariance += entry**2 / dim
    return invariance / (num_samples * dim), variance, covariance


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms_equal_the_definition(shape: tuple[int, int]) -> None:
    terms = vicreg_loss(*random_views(*shape), invariance=3.0, variance=5.0, covariance=7.0)
    expected = by_definition(*random_views(*shape))
    assert min(expected) > 0
    assert [float(each) for each in terms[1:]] == pytest.approx(expected, rel=1e-12)  # float64, other order of sums
    total = 3 * expected[0] + 5 * expected[1] + 7 * expected[2]
    assert float(terms.loss) == pytest.approx(total, rel=1e-12)


def test_equals_an_independent_library_on_the_closed_fixture() -> None:
    assert float(loss_of(*closed_views())) == pytest.approx(14.2268143, rel=1e-6)  # fp32, given to nine digits


def test_equal_varied_and_orthogonal_features_cost_nothing() -> None:
    z = hadamard(16)[:, 1:8]
    assert [float(each) for each in vicreg_loss(z, z)] == pytest.approx([0, 0, 0, 0], abs=1e-12)


def test_collapsed_embeddings_cost_the_variance_alone_and_have_a_finite_gradient() -> None:
    z = torch.ones(8, 5, dtype=torch.float64, requires_grad=True)
    terms = vicreg_loss(z, z)
    terms.loss.backward()
    assert [float(each.detach()) for each in terms] == pytest.approx([25 * 0.99, 0, 0.99, 0], abs=1e-12)
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_offset_and_order_do_not_matter_but_scale_does() -> None:
    z1, z2 = random_views(12, 6)
    generator = torch.Generator().manual_seed(3)
    samples, features = torch.randperm(12, generator=generator), torch.randperm(6, generator=generator)
    loss = float(loss_of(z1, z2))
    assert float(loss_of(z1 + 5, z2 + 5)) == pytest.approx(loss, rel=1e-10)
    assert float(loss_of(z1[samples], z2[samples])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z1[:, features], z2[:, features])) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(z2, z1)) == pytest.approx(loss, rel=1e-12)
    shifted, wide = vicreg_loss(z1 + 5, z2), vicreg_loss(2 * z1, 2 * z2)
    assert float(shifted.variance) == pytest.approx(float(vicreg_loss(z1, z2).variance), rel=1e-12)
    assert float(wide.covariance) == pytest.approx(16 * float(vicreg_loss(z1, z2).covariance), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_equals_finite_differences(shape: tuple[int, int]) -> None:
    z1, z2 = (z.requires_grad_() for z in random_views(*shape))
    assert torch.autograd.gradcheck(loss_of, (z1, z2))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    z1, z2 = (z.bfloat16() for z in random_views(32, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = vicreg_loss(z1, z2)
    assert {each.dtype for each in terms} == {torch.float32}
    assert torch.equal(terms.loss, vicreg_loss(z1.float(), z2.float()).loss)


def narrow_and_wide(z1: Tensor, z2: Tensor) -> VicregLoss:
    """Both ways to the covariances in one loss: of 5 features, and of 40 for 16 samples."""
    widened = [torch.cat([torch.sin(step * z) for step in range(1, 9)], dim=1) for z in (z1, z2)]
    return VicregLoss(*(a + b for a, b in zip(vicreg_loss(z1, z2), vicreg_loss(*widened), strict=True)))


def term(z1: Tensor, z2: Tensor, *, name: str) -> Tensor:
    value: Tensor = getattr(narrow_and_wide(z1, z2), name)
    return value


@pytest.mark.parametrize(("num_ranks", "name"), [(2, "loss"), (4, "loss"), (2, "covariance")])
def test_ranks_equal_one_process(num_ranks: int, name: str) -> None:
    assert_ranks_equal_one_process(partial(term, name=name), num_ranks=num_ranks)
