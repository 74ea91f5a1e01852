from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.methods.barlow_twins import BarlowTwins

VIEWS = list(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def test_dimension_is_the_width_of_all_three_layers() -> None:
    method = BarlowTwins(TinyResNet(), embed_dim=32)
    widths = [layer.weight.shape for layer in method.projector if isinstance(layer, nn.Linear)]
    assert widths == [(32, 128), (32, 32), (32, 32)]


def test_loss_scale_scales_the_gradient_and_not_the_terms() -> None:
    torch.manual_seed(0)
    plain = BarlowTwins(TinyResNet(), embed_dim=16)
    scaled = BarlowTwins(TinyResNet(), embed_dim=16, loss_scale=1 / 16)
    scaled.load_state_dict(plain.state_dict())
    one, other = plain(VIEWS), scaled(VIEWS)
    assert other.loss.item() == one.loss.item() / 16  # a power of two is exact
    assert torch.equal(other.metrics["invariance"], one.metrics["invariance"])


def test_metrics_add_up_to_the_loss() -> None:
    output = BarlowTwins(TinyResNet(), embed_dim=16, off_diagonal=0.01)(VIEWS)
    total = output.metrics["invariance"] + 0.01 * output.metrics["redundancy"]
    assert float(total) == pytest.approx(output.loss.item(), rel=1e-6)  # fp32
    assert float(output.metrics["loss_per_dim"]) == pytest.approx(output.loss.item() / 16, rel=1e-6)
    assert float(output.metrics["sampling_floor"]) == pytest.approx(0.01 * 16 * 15 / 7)


def test_each_view_has_its_own_moments() -> None:
    torch.manual_seed(0)
    method = BarlowTwins(TinyResNet(), embed_dim=16)
    method(VIEWS)
    norm = next(module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 2


def test_another_number_of_views_is_refused() -> None:
    with pytest.raises(ValueError, match="views: this method takes 2, the recipe makes 1"):
        BarlowTwins(TinyResNet(), embed_dim=16)(VIEWS[:1])
