"""Inputs of the loss tests."""

from __future__ import annotations

import torch
from torch import Tensor


def closed_views() -> tuple[Tensor, Tensor]:
    """Two correlated views of 8 samples in 16 dimensions, from a formula: the same on every machine."""
    index = torch.arange(128, dtype=torch.float64).view(8, 16)
    first = torch.sin(0.37 * index + 0.1)
    return first.float(), (first + 0.25 * torch.cos(0.53 * index)).float()


def random_views(num_samples: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two correlated views in float64, with features of unequal scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, num_samples, dim, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    return first * scale + 0.3, (first + 0.5 * noise) * scale - 0.1


def hadamard(order: int) -> Tensor:
    """Rows and columns of +-1, orthogonal; every column but the first has zero mean. `order` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def rank_slice(x: Tensor, rank: int, world_size: int) -> Tensor:
    """The contiguous part of a global batch that a rank holds."""
    return x.tensor_split(world_size)[rank]
