from __future__ import annotations

import pytest
import torch

from ssl_methods.backbones.tiny_binary import TinyBinary
from ssl_methods.binary import binary_convolutions


@pytest.mark.parametrize("side", [12, 28, 33])
def test_images_of_any_small_size_give_128_features(side: int) -> None:
    backbone = TinyBinary()
    assert backbone.embed_dim == 128
    assert backbone(torch.zeros(2, 3, side, side)).shape == (2, 128)


def test_nearly_all_weights_are_binary() -> None:
    backbone = TinyBinary()
    binary = sum(layer.weight.numel() for _, layer in binary_convolutions(backbone))
    real = sum(value.numel() for value in backbone.parameters()) - binary
    assert binary == 220_160
    assert real < 5_000


def test_memory_layout_of_the_images_does_not_matter() -> None:
    backbone = TinyBinary().eval()
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images), backbone(images.contiguous(memory_format=torch.channels_last)))
