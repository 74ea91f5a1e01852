"""Barlow Twins: make the cross-correlation of two views the identity."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import standardise, world_size
from ssl_methods.losses.cross_products import cross_products
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

    Over ranks: moments and correlation are those of the global batch, batches must be equal, and the gradient is
    exact. The authors' code sums the correlation outside autograd, so its gradient is this one divided by the number
    of ranks.

    Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1-2; lambda as in the authors' code (the paper says 0.005).
    """
    num_samples = len(z1) * world_size()
    products = cross_products(standardise(z1, epsilon=EPSILON), standardise(z2, epsilon=EPSILON))
    invariance = (1 - products.diagonal / num_samples).square().sum()
    redundancy = products.off_diagonal / num_samples**2
    return BarlowTwinsLoss(invariance + off_diagonal * redundancy, invariance, redundancy)


def sampling_floor(dim: int, global_batch: int, *, off_diagonal: float = 0.0051) -> float:
    """Return the weighted redundancy that independent features pay by chance: lambda dim (dim - 1) / (batch - 1).

    Losses of different dim or batch are comparable only above it.
    """
    return off_diagonal * dim * (dim - 1) / (global_batch - 1)
