from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.losses.nt_xent import nt_xent_loss
from ssl_methods.methods.simclr import SimCLR

VIEWS = list(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_nt_xent_of_both_views_in_one_batch(temperature: float) -> None:
    torch.manual_seed(0)
    method = SimCLR(TinyResNet(), embed_dim=16, hidden_dim=24, temperature=temperature).double()
    z1, z2 = copy.deepcopy(method.projector)(copy.deepcopy(method.backbone)(torch.cat(VIEWS))).chunk(2)
    expected = nt_xent_loss(z1, z2, temperature=temperature).item()
    assert method(VIEWS).loss.item() == pytest.approx(expected, rel=1e-12)  # float64
    norm = next(module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1
