from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_methods.backbones.tiny_vit import TinyViT


def images_of(side: int, *, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def network() -> TinyViT:
    torch.manual_seed(0)
    return TinyViT()


@pytest.mark.parametrize("side", [4, 5, 12, 16, 28, 32, 33])
def test_images_of_any_small_size_give_96_features(side: int) -> None:
    backbone = network()
    assert backbone.embed_dim == 96
    assert backbone(images_of(side)).shape == (4, 96)


def test_it_is_small() -> None:
    assert 200_000 < sum(parameter.numel() for parameter in network().parameters()) < 400_000


def test_no_layer_couples_the_images_of_a_batch() -> None:
    backbone = network()
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    images = images_of(28)
    alone = torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(backbone(images), alone, rtol=1e-4, atol=1e-5)  # fp32, other matrix products


def test_the_place_of_a_patch_matters() -> None:
    backbone = network().double()
    images = images_of(16).double()
    rows, columns = images.roll(4, dims=2), images.roll(4, dims=3)
    features = [backbone(each) for each in (images, rows, columns, images.transpose(2, 3))]
    for i, one in enumerate(features):
        assert all((one - other).abs().max() > 1e-3 for other in features[i + 1 :])


def test_memory_layout_of_the_images_does_not_matter() -> None:
    backbone = network().double()
    images = images_of(28).double()
    last = backbone(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, backbone(images), rtol=1e-10, atol=1e-12)  # float64, another convolution


def test_half_precision_autocast_keeps_features_finite_and_close() -> None:
    backbone = network()
    images = images_of(28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(images)
    torch.testing.assert_close(features.float(), backbone(images), rtol=0, atol=0.05)  # bf16: 2^-8 of values near 1
