from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.losses.vicreg import vicreg_loss
from ssl_methods.methods.vicreg import VICReg

VIEWS = list(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def build(embed_dim: int = 16, **weights: float) -> VICReg:
    torch.manual_seed(0)
    return VICReg(TinyResNet(), embed_dim=embed_dim, **weights).double()


def test_metrics_add_up_to_the_loss_as_the_knobs_weigh_them() -> None:
    output = build(invariance=2.0, variance=3.0, covariance=5.0)(VIEWS)
    terms = [float(output.metrics[name]) for name in ("invariance", "variance", "covariance")]
    assert output.loss.item() == pytest.approx(2 * terms[0] + 3 * terms[1] + 5 * terms[2], rel=1e-12)


def test_defaults_are_the_published_ones() -> None:
    with torch.device("meta"):  # a gigabyte otherwise
        method = VICReg(TinyResNet())
    assert method.weights == {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    layers = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(8192, 128), (8192, 8192), (8192, 8192)]


def test_loss_is_that_of_the_expanded_views_each_with_its_own_moments() -> None:
    method, by_hand = build(), build()
    z1, z2 = (by_hand.projector(by_hand.backbone(view)) for view in VIEWS)
    expected = vicreg_loss(z1, z2).loss.item()
    assert method(VIEWS).loss.item() == pytest.approx(expected, rel=1e-12)
    counts = {name: int(value) for name, value in method.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {2}
