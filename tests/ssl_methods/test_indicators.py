from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssl_methods.indicators import embedding_std, rank_me


def test_spread_embeddings_score_one_at_any_length() -> None:
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert float(embedding_std(z)) == pytest.approx(1, abs=0.01)  # sampling noise 1 / sqrt(2 * 4096)
    assert float(embedding_std(100 * z)) == pytest.approx(float(embedding_std(z)), rel=1e-5)


def test_collapsed_embeddings_score_zero() -> None:
    assert float(embedding_std(torch.ones(16, 8))) == pytest.approx(0, abs=1e-6)


def test_embeddings_on_a_line_score_low() -> None:
    z = torch.linspace(1, 2, 64)[:, None] * torch.ones(1, 32)
    assert float(embedding_std(z)) == pytest.approx(0, abs=1e-5)  # same direction, different length


def slow_rank_me(embeddings: Tensor) -> float:
    """The paper's formula, a term at a time, from singular values in float64."""
    singular = torch.linalg.svdvals(embeddings.double()).tolist()
    shares = [value / sum(singular) + 1e-7 for value in singular]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32), (1, 8)])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_rank_me_equals_the_formula_of_the_paper(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    z = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    # squared float64 singular values resolve 1e-8 of the largest, a tenth of epsilon
    assert float(rank_me(z)) == pytest.approx(slow_rank_me(z), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 32])
def test_rank_me_counts_equally_strong_directions(rank: int) -> None:
    random = torch.randn(96, rank, generator=torch.Generator().manual_seed(0))
    z = 7 * torch.linalg.qr(random).Q @ torch.eye(rank, 32)  # orthonormal columns: equal singular values
    # epsilon adds -1e-7 log 1e-7 = 1.6e-6 to the entropy for each absent direction, 5e-5 for 31 of them
    assert float(rank_me(z)) == pytest.approx(rank, rel=1e-4)


def test_rank_me_does_not_depend_on_scale_or_rotation() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(48, 24, generator=generator) * torch.linspace(0.01, 1, 24)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    assert float(rank_me(1000 * z @ rotation)) == pytest.approx(float(rank_me(z)), rel=1e-5)  # float32 rotation


def test_rank_me_of_embeddings_that_are_all_zero_is_one() -> None:
    assert float(rank_me(torch.zeros(16, 8))) == pytest.approx(1, abs=1e-4)  # epsilon's share, as above


def test_rank_me_of_a_broken_batch_is_no_number_and_raises_nothing() -> None:
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    z[3, 3] = torch.inf
    assert math.isnan(float(rank_me(z)))


def test_rank_me_takes_half_precision_and_gives_no_gradient() -> None:
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    assert not rank_me(z).requires_grad
    assert float(rank_me(z)) == pytest.approx(slow_rank_me(z.detach()), rel=1e-5)
