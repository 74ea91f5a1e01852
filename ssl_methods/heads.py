"""Small networks on top of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def build_projector(dims: Sequence[int]) -> nn.Sequential:
    """Stack Linear - BatchNorm - ReLU layers and end with a bare Linear.

    Args:
        dims: widths from input to output, at least two. No Linear has a bias: the batch norm behind it, or the
            standardisation inside the loss, would cancel it.
    """
    *hidden, last = pairwise(dims)
    layers: list[nn.Module] = []
    for input_dim, output_dim in hidden:
        layers += [nn.Linear(input_dim, output_dim, bias=False), nn.BatchNorm1d(output_dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*last, bias=False))
