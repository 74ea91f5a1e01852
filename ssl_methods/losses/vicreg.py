"""VICReg: equal views, features that vary, and features that do not vary together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum, world_size
from ssl_methods.losses.cross_products import cross_products
from ssl_methods.precision import in_full_precision

EPSILON = 1e-4  # inside the root of the standard deviation


class VicregLoss(NamedTuple):
    """`loss` is the weighted sum of the other three."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    covariance: Float[Tensor, ""]


@in_full_precision
def vicreg_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> VicregLoss:
    """Pull two views together, keep each feature's deviation above 1 and its covariance with the others at 0.

    Args:
        z1: projections of one view of the images.
        z2: projections of the other view of the same images.
        invariance: weight of the mean squared difference, over samples and features (lambda).
        variance: weight of the hinge on the standard deviation, averaged over features and over both views (mu).
        covariance: weight of the squared covariances, summed over both views and divided by dim (nu).

    Over ranks: means and covariances are those of the global batch, batches must be equal, and the gradient is exact.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-6; the averages over features (invariance) and views (variance)
        are those of the authors' code, where the paper sums.
    """
    num_samples, dim = len(z1) * world_size(), z1.shape[1]
    sums = all_reduce_sum(torch.cat([z1.sum(dim=0), z2.sum(dim=0), F.mse_loss(z1, z2, reduction="sum").view(1)]))
    invariance_term = sums[-1] / (num_samples * dim)
    views = [z - total / num_samples for z, total in zip((z1, z2), sums[:-1].chunk(2), strict=True)]
    products = [cross_products(view, view) for view in views]
    scatter = torch.stack([each.diagonal for each in products])  # the covariances' diagonals, times num_samples - 1
    variance_term = F.relu(1 - torch.sqrt(scatter / (num_samples - 1) + EPSILON)).mean()
    covariance_term = (products[0].off_diagonal + products[1].off_diagonal) / (dim * (num_samples - 1) ** 2)
    loss = invariance * invariance_term + variance * variance_term + covariance * covariance_term
    return VicregLoss(loss, invariance_term, variance_term, covariance_term)
