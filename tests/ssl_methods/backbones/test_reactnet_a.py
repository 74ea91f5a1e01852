from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssl_methods.backbones.reactnet_a import ReActNetA
from ssl_methods.binary import BinaryConv2d, binary_convolutions


def test_it_has_the_published_number_of_binary_weights() -> None:
    with torch.device("meta"):
        network = ReActNetA()
    sizes = [layer.weight.numel() for _, layer in binary_convolutions(network)]
    # 13 of 3x3, and 13 of 1x1 with a second one in each of the five doubling blocks but no third
    assert len(sizes) == 13 + 13 + 5
    assert sum(sizes) == 28_253_184
    # three vectors per RPReLU, one per RSign, two per batch norm, and the stem
    assert sum(value.numel() for value in network.parameters()) - sum(sizes) < 70_000


def test_it_has_the_published_cost_at_224_pixels() -> None:
    """Multiplications and additions as the paper counts them: 0.12e8 real and 4.82e9 binary, of which 64 are one."""
    found = {BinaryConv2d: 0, nn.Conv2d: 0}

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        found[type(layer)] += output[0, 0].numel() * layer.weight.numel()

    with torch.device("meta"):
        network = ReActNetA().eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 1024)
    classifier = 1024 * 1000
    assert found[BinaryConv2d] == pytest.approx(4.82e9, rel=2e-3)
    assert found[nn.Conv2d] + classifier == pytest.approx(0.12e8, rel=0.02)
    assert found[nn.Conv2d] + classifier + found[BinaryConv2d] / 64 == pytest.approx(0.87e8, rel=5e-3)


@pytest.mark.parametrize("side", [64, 33])
def test_sides_are_halved_five_times_and_rounded_up(side: int) -> None:
    with torch.device("meta"):
        network = ReActNetA()
        maps = network.blocks(network.stem(torch.empty(2, 3, side, side)))
    assert maps.shape == (2, 1024, 2, 2)
