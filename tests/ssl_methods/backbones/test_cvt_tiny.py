from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_methods.backbones.cvt_tiny import CvTTiny
from ssl_methods.transformer import TransformerBlock


def test_both_crops_of_the_published_recipe_give_49_and_9_tokens_and_the_size_is_the_published_one() -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = CvTTiny()
        shapes = [backbone.encode(torch.empty(2, 3, side, side)).tokens.shape for side in (224, 96)]
    assert shapes == [(2, 49, 768), (2, 9, 768)]
    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6) == 29  # EsViT, table 4


def test_gradient_reaches_everything() -> None:
    torch.manual_seed(0)
    backbone = CvTTiny().eval()  # or blocks are dropped
    features, tokens = backbone.encode(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(tokens.mean(dim=1), features)
    features.square().sum().backward()
    idle = [name for name, value in backbone.named_parameters() if value.grad is None or not bool(value.grad.any())]
    assert not idle


def test_attention_stays_in_its_window_apart_from_the_convolutions() -> None:
    torch.manual_seed(0)
    attention = CvTTiny(window=4).stages[0][0].attention.eval()
    for module in attention.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.zeros(3, 3).index_fill_(0, torch.tensor([1]), 1.0) * torch.eye(3)
    grid = torch.randn(1, 8, 8, 64)
    other = grid.clone()
    other[0, 2, 5] += 1.0
    reached = (attention(grid) != attention(other)).any(dim=-1)[0]
    assert bool(reached[:4, 4:].all())
    assert int(reached.sum()) == 16


def test_blocks_drop_out_more_often_towards_the_last() -> None:
    with torch.device("meta"):
        blocks = [module for module in CvTTiny().modules() if isinstance(module, TransformerBlock)]
    assert [block.drop.p for block in blocks] == pytest.approx([0.1 * index / 11 for index in range(12)])
