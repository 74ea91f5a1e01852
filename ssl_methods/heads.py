"""Small networks on top of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn


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


def build_mlp(dims: Sequence[int], *, activation: type[nn.Module]) -> nn.Sequential:
    """Stack Linear layers with biases and no norm, an activation between them, none behind the last.

    Args:
        dims: widths from input to output, at least two.
        activation: built without arguments.
    """
    *hidden, last = pairwise(dims)
    layers: list[nn.Module] = []
    for input_dim, output_dim in hidden:
        layers += [nn.Linear(input_dim, output_dim), activation()]
    return nn.Sequential(*layers, nn.Linear(*last))


class UnitLinear(nn.Module):
    """A Linear without bias whose weight rows are scaled to unit length when used; only their direction is learnt.

    It is weight norm with its gain held at 1 (Salimans and Kingma 2016, arXiv:1602.07868).

    Args:
        input_dim, output_dim: widths.
        learn_gain: let the length of each row be learnt by itself, from 1: plain weight norm.
    """

    def __init__(self, input_dim: int, output_dim: int, *, learn_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(input_dim, output_dim, bias=False).weight.detach())
        if learn_gain:
            # a column, as torch's weight norm has it: optimizers then decay it like a matrix
            self.gain = nn.Parameter(torch.ones(output_dim, 1))
        self.learn_gain = learn_gain

    def forward(self, x: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch output_dim"]:
        """Return the products with the rows, which are unit vectors times their gains."""
        rows = F.normalize(self.weight, dim=1)
        return F.linear(x, rows * self.gain if self.learn_gain else rows)

    @torch.no_grad()
    def reset_lengths(self) -> None:
        """Scale the rows themselves to unit length, which changes no product; does nothing to a parameter in parts."""
        self.weight.copy_(F.normalize(self.weight, dim=-1))  # whose shape here is (0,)


class DinoHead(nn.Module):
    """Three Linear layers to a bottleneck, its unit vector, and the cosines with `output_dim` learnt directions.

    Args:
        input_dim: width of the backbone's features.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the embedding that is compared with the directions.
        output_dim: number of directions (K).
        learn_gain: let each direction have a length too, from 1 (the authors' `norm_last_layer: false`).

    Source: Caron et al. 2021, arXiv:2104.14294, appendix C; no batch norm, GELU, truncated normal weights of std 0.02.
    """

    def __init__(
        self, input_dim: int, *, hidden_dim: int, bottleneck_dim: int, output_dim: int, learn_gain: bool = False
    ) -> None:
        super().__init__()
        self.mlp = build_mlp([input_dim, hidden_dim, hidden_dim, bottleneck_dim], activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = UnitLinear(bottleneck_dim, output_dim, learn_gain=learn_gain)

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch output_dim"]:
        """Return the cosines; they are logits once divided by a temperature."""
        return self.compare(self.mlp(features))

    def compare(self, embeddings: Float[Tensor, "batch bottleneck_dim"]) -> Float[Tensor, "batch output_dim"]:
        """Return the cosines of embeddings, which are what `mlp` makes, with the learnt directions, times any gains."""
        cosines: Tensor = self.last_layer(F.normalize(embeddings, dim=1))
        return cosines
