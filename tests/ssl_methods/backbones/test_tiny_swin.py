from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_methods.backbones.tiny_swin import TinySwin


@pytest.mark.parametrize(("side", "num_tokens"), [(28, 49), (16, 16), (12, 9), (8, 4), (33, 81)])
def test_images_of_any_small_size_give_tokens_and_their_mean(side: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    features, tokens = TinySwin().encode(torch.randn(2, 3, side, side))
    assert tokens.shape == (2, num_tokens, 96)
    torch.testing.assert_close(tokens.mean(dim=1), features)


def test_it_is_small_and_all_of_it_learns() -> None:
    torch.manual_seed(0)
    backbone = TinySwin()
    assert 150_000 < sum(parameter.numel() for parameter in backbone.parameters()) < 300_000
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    backbone(torch.randn(2, 3, 28, 28)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in backbone.parameters())


def test_windows_keep_a_block_local_and_their_shift_joins_them() -> None:
    torch.manual_seed(0)
    backbone = TinySwin(window=4).double()
    grid = torch.randn(1, 8, 8, 48, dtype=torch.float64)
    other = grid.clone()
    other[0, 0, 0] *= torch.linspace(-1, 2, 48)  # which no layer norm undoes
    whole, shifted = backbone.stages[0]
    reached = (whole(grid) != whole(other)).any(dim=-1)[0]
    assert bool(reached[:4, :4].all())
    assert int(reached.sum()) == 16
    beyond = (shifted(whole(grid)) != shifted(whole(other))).any(dim=-1)[0]
    assert bool(beyond[:6, :6].all())
    assert int(beyond.sum()) == 36
