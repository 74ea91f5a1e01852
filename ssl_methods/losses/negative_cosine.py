"""Negative cosine similarity: let a prediction point where its target points."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.precision import in_full_precision


@in_full_precision
def negative_cosine_loss(
    predictions: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Return minus the cosine of each prediction with its target, averaged over the global batch: -1 at best.

    The same number, exact gradient, on every rank. BYOL's squared distance of unit vectors is 2 + 2 times this.

    Args:
        predictions: of any length.
        targets: of any length; no gradient reaches them.

    Source: Chen and He 2020, arXiv:2011.10566, eq. 1; Grill et al. 2020, arXiv:2006.07733, eq. 2.
    """
    total = F.cosine_similarity(predictions, targets.detach(), dim=1).sum()
    sums = all_reduce_sum(torch.stack([total, total.new_full((), len(predictions))]))
    return -sums[0] / sums[1]
