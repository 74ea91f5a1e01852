from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_methods.ema import build_twin
from ssl_methods.transformer import StochasticDepth, TransformerBlock, initialise, rising_drops


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = StochasticDepth(0.25)(torch.ones(4000, 2, 3))
    assert {round(float(value), 6) for value in dropped.unique()} == {0.0, round(4 / 3, 6)}
    assert bool((dropped == dropped[:, :1, :1]).all())
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.04)  # 4000 draws: standard error 0.009


def test_stochastic_depth_is_idle_in_evaluation_in_twins_and_at_zero() -> None:
    x = torch.randn(8, 3)
    for layer in (StochasticDepth(0.5).eval(), build_twin(StochasticDepth(0.5)), StochasticDepth(0.0)):
        assert torch.equal(layer(x), x)


def test_drops_rise_from_nothing_over_all_blocks() -> None:
    drops = rising_drops(0.1, (2, 3))
    assert [len(each) for each in drops] == [2, 3]
    assert [each for stage in drops for each in stage] == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1], abs=1e-7)


def test_block_adds_two_branches_behind_layer_norms() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(4, nn.Linear(4, 4), hidden_dim=8)
    initialise(block)
    x = torch.randn(2, 5, 5, 4)
    after = x + block.attention(block.norm1(x))
    assert torch.equal(block(x), after + block.mlp(block.norm2(after)))
