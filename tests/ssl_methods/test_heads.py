from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ssl_methods.heads import DinoHead, UnitLinear, build_mlp, build_projector


def test_hidden_layers_are_normalised_and_the_last_is_bare() -> None:
    kinds = [type(layer) for layer in build_projector([4, 8, 8, 2])]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear]


def test_no_linear_layer_has_a_bias() -> None:
    linears = [layer for layer in build_projector([4, 8, 2]) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features, layer.bias) for layer in linears] == [(4, 8, None), (8, 2, None)]


def test_mlp_has_biases_and_its_activation_between_layers_only() -> None:
    layers = list(build_mlp([4, 8, 8, 2], activation=nn.GELU))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert all(layer.bias is not None for layer in layers if isinstance(layer, nn.Linear))


def test_unit_linear_equals_torchs_weight_norm_with_its_gain_held_at_one() -> None:
    torch.manual_seed(0)
    ours = UnitLinear(6, 9).double()
    theirs = weight_norm(nn.Linear(6, 9, bias=False).double())
    gain, direction = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    gain.requires_grad_(False).fill_(1.0)
    direction.data.copy_(ours.weight.data)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=0)  # float64
    for layer in (ours, theirs):
        layer(x).pow(3).sum().backward()
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, direction.grad, rtol=1e-10, atol=1e-13)
    # the length of a row means nothing, so the gradient is orthogonal to it
    torch.testing.assert_close((ours.weight * ours.weight.grad).sum(dim=1), torch.zeros(9, dtype=torch.float64))


def test_dino_head_gives_cosines_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    head = DinoHead(6, hidden_dim=32, bottleneck_dim=8, output_dim=40).double()
    embeddings = torch.randn(7, 8, dtype=torch.float64)
    cosines = head.compare(embeddings)
    assert float(cosines.detach().abs().max()) <= 1
    torch.testing.assert_close(head.compare(5 * embeddings), cosines, rtol=1e-12, atol=1e-14)
    head.last_layer.weight.data *= 3
    torch.testing.assert_close(head.compare(embeddings), cosines, rtol=1e-12, atol=1e-14)
    features = torch.randn(7, 6, dtype=torch.float64)
    assert torch.equal(head(features), head.compare(head.mlp(features)))


def test_dino_head_starts_as_published() -> None:
    torch.manual_seed(0)
    head = DinoHead(64, hidden_dim=128, bottleneck_dim=32, output_dim=40)
    layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(128, 64), (128, 128), (32, 128)]
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)  # 4096 draws: standard error 1 %
        assert bool((layer.bias == 0).all())


def test_resetting_lengths_changes_no_product() -> None:
    torch.manual_seed(0)
    layer, x = UnitLinear(6, 9).double(), torch.randn(5, 6, dtype=torch.float64)
    layer.weight.data *= 3
    before = layer(x)
    layer.reset_lengths()
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(9, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=0)
    layer.weight.data = torch.empty(0, dtype=torch.float64)  # as under ZeRO 3, between steps
    layer.reset_lengths()


def test_learnt_gain_is_torchs_weight_norm_and_starts_at_one() -> None:
    torch.manual_seed(0)
    ours = UnitLinear(6, 9, learn_gain=True).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    fixed = UnitLinear(6, 9).double()
    fixed.weight.data.copy_(ours.weight.data)
    assert torch.equal(ours(x), fixed(x))
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]
    theirs = weight_norm(nn.Linear(6, 9, bias=False).double())
    gain, direction = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    assert ours.gain.shape == gain.shape
    ours.gain.data.copy_(torch.linspace(0.5, 2, 9)[:, None])
    gain.data.copy_(ours.gain.data)
    direction.data.copy_(ours.weight.data)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-14)  # float64
    for layer in (ours, theirs):
        layer(x).pow(3).sum().backward()
    torch.testing.assert_close(ours.gain.grad, gain.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours.weight.grad, direction.grad, rtol=1e-10, atol=1e-13)
