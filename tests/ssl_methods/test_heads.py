from __future__ import annotations

from torch import nn

from ssl_methods.heads import build_projector


def test_hidden_layers_are_normalised_and_the_last_is_bare() -> None:
    kinds = [type(layer) for layer in build_projector([4, 8, 8, 2])]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear]


def test_no_linear_layer_has_a_bias() -> None:
    linears = [layer for layer in build_projector([4, 8, 2]) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features, layer.bias) for layer in linears] == [(4, 8, None), (8, 2, None)]
