from __future__ import annotations

import pytest
import torch

from ssl_methods.backbones.tiny_resnet import TinyResNet


@pytest.mark.parametrize("side", [12, 28, 32, 33])
def test_images_of_any_small_size_give_128_features(side: int) -> None:
    backbone = TinyResNet()
    assert backbone.embed_dim == 128
    assert backbone(torch.zeros(2, 3, side, side)).shape == (2, 128)


def test_blocks_start_as_the_identity() -> None:
    block = TinyResNet().stages[0]
    x = torch.rand(2, 24, 14, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def test_memory_layout_of_the_images_does_not_matter() -> None:
    backbone = TinyResNet().eval()
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images), backbone(images.contiguous(memory_format=torch.channels_last)))
