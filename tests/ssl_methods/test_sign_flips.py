from __future__ import annotations

import torch
from torch import nn

from ssl_methods.binary import BinaryConv2d
from ssl_methods.sign_flips import SignFlips


def network() -> nn.Sequential:
    """Ten binary weights of 0.1 and some real ones."""
    layers = nn.Sequential(BinaryConv2d(2, 4, 1), nn.Conv2d(4, 2, 1), BinaryConv2d(1, 2, 1))
    for layer in (layers[0], layers[2]):
        nn.init.constant_(layer.weight, 0.1)
    return layers


def test_changed_signs_and_long_weights_are_counted_over_all_layers() -> None:
    layers, counts = network(), SignFlips()
    counts.remember(layers)
    layers[0].weight.data.view(-1)[:2] = torch.tensor([-0.1, 1.5])
    layers[2].weight.data.view(-1)[0] = -2
    layers[1].weight.data.mul_(-5)
    counts.compare(layers)
    assert {name: round(float(value), 6) for name, value in counts.metrics().items()} == {
        "sign_flip_rate": 0.2,
        "saturated_fraction": 0.2,
    }
    counts.remember(layers)
    counts.compare(layers)
    assert float(counts.metrics()["sign_flip_rate"]) == 0  # since the last step, not since the first
    assert float(counts.metrics()["saturated_fraction"]) > 0


def test_zero_counts_as_positive() -> None:
    layers, counts = network(), SignFlips()
    counts.remember(layers)
    layers[0].weight.data.zero_()
    counts.compare(layers)
    assert float(counts.flip_rate) == 0
    counts.remember(layers)
    layers[0].weight.data.fill_(0.1)
    counts.compare(layers)
    assert float(counts.flip_rate) == 0


def test_numbers_are_part_of_the_state_and_the_signs_are_not() -> None:
    layers, counts, other = network(), SignFlips(), SignFlips()
    counts.remember(layers)
    layers[2].weight.data.neg_()
    counts.compare(layers)
    assert counts.state_dict().keys() == {"flip_rate", "saturated_fraction"}
    other.load_state_dict(counts.state_dict())
    assert other.metrics() == counts.metrics()
    other.compare(layers)  # without signs to compare with
    assert float(other.flip_rate) == float(counts.flip_rate) > 0


def test_metrics_stay_when_the_counts_go_on() -> None:
    layers, counts = network(), SignFlips()
    before = counts.metrics()
    counts.remember(layers)
    layers[0].weight.data.neg_()
    counts.compare(layers)
    assert float(before["sign_flip_rate"]) == 0
