"""Barlow Twins: make the cross-correlation of two views the identity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.precision import in_full_precision

EPSILON = 1e-5  # inside the root of the standard deviation, as batch norm has it in the authors' code


class BarlowTwinsLoss(NamedTuple):
    """`loss` = `invariance` + off_diagonal x `redundancy`."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    redundancy: Float[Tensor, ""]


@in_full_precision
def barlow_twins_loss(
    z1: Float[Tensor, "batch dim"], z2: Float[Tensor, "batch dim"], *, off_diagonal: float = 0.0051
) -> BarlowTwinsLoss:
    """Pull the cross-correlation of two views towards the identity.

    Args:
        z1: projections of one view of the images, any scale and offset.
        z2: projections of the other view of the same images.
        off_diagonal: weight of the redundancy term (lambda).

    Returns:
        Loss summed over the dim x dim entries, not averaged: it grows with dim and, through sampling noise, with
        dim^2 / batch (see `sampling_floor`).

    Over ranks: moments and correlation are those of the global batch and the gradient is exact. The authors' code
    sums the correlation outside autograd, so its gradient is this one divided by the number of ranks.

    Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1-2; lambda as in the authors' code (the paper says 0.005).
    """
    dim = z1.shape[1]
    standardised, count = _standardise(torch.cat([z1, z2], dim=1))
    correlation = all_reduce_sum(standardised[:, :dim].T @ standardised[:, dim:]) / count
    invariance = (1 - correlation.diagonal()).square().sum()
    redundancy = correlation.square().fill_diagonal_(0.0).sum()
    return BarlowTwinsLoss(invariance + off_diagonal * redundancy, invariance, redundancy)


def sampling_floor(dim: int, global_batch: int, *, off_diagonal: float = 0.0051) -> float:
    """Return the weighted redundancy that independent features pay by chance: lambda dim (dim - 1) / (batch - 1).

    Losses of different dim or batch are comparable only above it.
    """
    return off_diagonal * dim * (dim - 1) / (global_batch - 1)


def _standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return z with zero mean and unit biased variance over the global batch, and that batch's size."""
    sums = all_reduce_sum(torch.cat([z.sum(dim=0), z.new_full((1,), len(z))]))
    count = sums[-1].detach()
    centred = z - sums[:-1] / count
    variance = all_reduce_sum(centred.square().sum(dim=0)) / count
    return centred * torch.rsqrt(variance + EPSILON), count
