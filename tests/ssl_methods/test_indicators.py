from __future__ import annotations

import pytest
import torch

from ssl_methods.indicators import embedding_std


def test_spread_embeddings_score_one_at_any_length() -> None:
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert float(embedding_std(z)) == pytest.approx(1, abs=0.01)  # sampling noise 1 / sqrt(2 * 4096)
    assert float(embedding_std(100 * z)) == pytest.approx(float(embedding_std(z)), rel=1e-5)


def test_collapsed_embeddings_score_zero() -> None:
    assert float(embedding_std(torch.ones(16, 8))) == pytest.approx(0, abs=1e-6)


def test_embeddings_on_a_line_score_low() -> None:
    z = torch.linspace(1, 2, 64)[:, None] * torch.ones(1, 32)
    assert float(embedding_std(z)) == pytest.approx(0, abs=1e-5)  # same direction, different length
