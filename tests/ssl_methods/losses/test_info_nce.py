from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.losses.info_nce import info_nce_loss
from tests.ssl_methods.gradients import OUTPUT_DIM, assert_ranks_equal_one_process
from tests.ssl_methods.inputs import random_views


def negatives_of(size: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64), dim=1)


def loss_of(queries: Tensor, keys: Tensor, negatives: Tensor, *, temperature: float = 0.2) -> Tensor:
    return info_nce_loss(queries, keys, negatives, temperature=temperature).loss


def by_definition(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, one query at a time."""

    def unit(row: Tensor) -> list[float]:
        values = [float(x) for x in row]
        length = math.sqrt(sum(x * x for x in values))
        return [x / length for x in values]

    def weight(one: list[float], other: list[float]) -> float:
        return math.exp(sum(a * b for a, b in zip(one, other, strict=True)) / temperature)

    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        positive = weight(unit(query), unit(key))
        total -= math.log(positive / (positive + sum(weight(unit(query), row.tolist()) for row in negatives)))
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equals_the_definition(temperature: float) -> None:
    queries, keys = random_views(7, 5)
    negatives = negatives_of(11, 5)
    loss = loss_of(queries, keys, negatives, temperature=temperature)
    expected = by_definition(queries, keys, negatives, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-12)  # float64, other order of sums


def test_equals_the_value_worked_out_by_hand() -> None:
    query, orthogonal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    terms = info_nce_loss(query, query, orthogonal, temperature=0.2)
    assert float(terms.loss) == pytest.approx(math.log1p(math.exp(-5)), rel=1e-5)  # fp32
    assert float(terms.accuracy) == 1


def test_lengths_rotation_and_order_do_not_matter() -> None:
    queries, keys = random_views(8, 6)
    negatives = negatives_of(10, 6)
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    lengths = 0.1 + torch.rand(8, 1, generator=generator, dtype=torch.float64)
    samples, rows = torch.randperm(8, generator=generator), torch.randperm(10, generator=generator)
    loss = float(loss_of(queries, keys, negatives))
    assert float(loss_of(queries * lengths, 3 * keys, negatives)) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(queries @ rotation, keys @ rotation, negatives @ rotation)) == pytest.approx(loss, rel=1e-12)
    assert float(loss_of(queries[samples], keys[samples], negatives[rows])) == pytest.approx(loss, rel=1e-12)


def test_collapsed_embeddings_cost_a_uniform_guess() -> None:
    same = F.normalize(torch.ones(12, 4, dtype=torch.float64), dim=1)
    assert float(loss_of(same[:3], same[:3], same)) == pytest.approx(math.log(13), rel=1e-12)


def test_accuracy_is_the_share_of_queries_nearest_to_their_own_key() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    queries, keys = axes[[0, 1, 2, 2]], axes[[0, 1, 0, 1]]
    assert float(info_nce_loss(queries, keys, axes[2:], temperature=0.2).accuracy) == 0.5


def test_gradient_equals_finite_differences() -> None:
    queries, keys = (z.requires_grad_() for z in random_views(5, 4))
    assert torch.autograd.gradcheck(partial(loss_of, negatives=negatives_of(6, 4)), (queries, keys))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    queries, keys = (z.bfloat16() for z in random_views(8, 8))
    negatives = negatives_of(16, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(queries, keys, negatives)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(queries.float(), keys.float(), negatives))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(partial(loss_of, negatives=negatives_of(12, OUTPUT_DIM)), num_ranks=num_ranks)
