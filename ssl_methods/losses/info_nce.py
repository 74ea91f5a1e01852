"""InfoNCE with a queue: tell an image's key from the keys of other images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.losses.cross_entropy import cross_entropy_loss
from ssl_methods.precision import in_full_precision


class InfoNceLoss(NamedTuple):
    """The loss, and the share of this rank's queries whose own key is the nearest of all."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


@in_full_precision
def info_nce_loss(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "size dim"],
    *,
    temperature: float,
) -> InfoNceLoss:
    """Classify each query's key among it and all negatives.

    Args:
        queries: embeddings of one view of the images, any length (normalised here).
        keys: embeddings of the other view of the same images, any length (normalised here).
        negatives: embeddings of other images, of unit length already; the same on every rank.
        temperature: divides the cosine similarities (tau).

    Returns:
        Cross-entropy averaged over the global batch: the same number, exact gradient, on every rank.

    Source: He et al. 2020, arXiv:1911.05722, eq. 1.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    queries = queries / temperature  # fewer numbers than the logits
    positive, negative = (queries * keys).sum(dim=1, keepdim=True), queries @ negatives.T
    logits = torch.cat([positive, negative], dim=1)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    accuracy = (positive.detach() >= negative.detach().amax(dim=1, keepdim=True)).float().mean()
    return InfoNceLoss(cross_entropy_loss(logits, labels), accuracy)
