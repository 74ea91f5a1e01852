"""Truncated triplet: an image's other view against a deputy, a negative that is hard but not the hardest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.precision import in_full_precision


class TruncatedTripletLoss(NamedTuple):
    """The loss over all ranks, and what it is made of on this one.

    Attributes:
        loss: hinge averaged over the global batch.
        active: share of this rank's anchors whose hinge is above 0.
        positive_similarity: mean cosine of anchors and their positives.
        deputy_similarity: mean cosine of anchors and their deputies.
    """

    loss: Float[Tensor, ""]
    active: Float[Tensor, ""]
    positive_similarity: Float[Tensor, ""]
    deputy_similarity: Float[Tensor, ""]


@in_full_precision
def truncated_triplet_loss(
    anchors: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch dim"],
    *,
    first_rank: int = 2,
    last_rank: int = 10,
    gamma: float = 2.0,
    margin: float = 100.0,
) -> TruncatedTripletLoss:
    """Pull anchors towards their own target and away from their deputy among the other targets.

    With d = -2 cosine (the squared distance of unit vectors, less 2), an anchor's negatives in order of d, hardest
    first, and the deputy's d the mean of those from `first_rank` to `last_rank`: max(0, gamma d_positive - d_deputy +
    margin). A margin of 6 or more keeps the hinge open at gamma 2, so that the loss is
    margin + 2 deputy similarity - 4 positive similarity, and the margin a constant.

    Args:
        anchors: predictions from one view of the images, any length (normalised here).
        targets: embeddings of the other view of the same images, any length; no gradient reaches them.
        first_rank: of the negatives that the deputy averages, the hardest, counted from 1.
        last_rank: the easiest of them; equal ranks take one negative. See `median_rank`.
        gamma: weight of the positive's d.
        margin: added inside the hinge.

    Raises:
        ValueError: fewer negatives than `last_rank`.

    Over ranks: an anchor's negatives are those of its own rank, as in the authors' code, so the number of ranks
    matters. The value is the mean over all ranks, with its exact gradient.

    Source: Wang et al. 2021, arXiv:2104.08760; ranks, gamma and margin of the authors' code.
    """
    similarities = F.normalize(anchors, dim=1) @ F.normalize(targets.detach(), dim=1).T
    positive = similarities.diagonal()
    deputy = deputy_similarities(similarities, first_rank=first_rank, last_rank=last_rank)
    hinge = F.relu(gamma * -2 * positive + 2 * deputy + margin)
    loss = all_reduce_sum(hinge.sum()) / all_reduce_sum(hinge.new_tensor(len(hinge)))
    active = (hinge.detach() > 0).to(hinge.dtype).mean()
    return TruncatedTripletLoss(loss, active, positive.detach().mean(), deputy.detach().mean())


def deputy_similarities(
    similarities: Float[Tensor, "batch batch"], *, first_rank: int, last_rank: int
) -> Float[Tensor, " batch"]:
    """Return each row's mean over its negatives of these ranks; its positive lies on the diagonal.

    Raises:
        ValueError: fewer negatives than `last_rank`.
    """
    batch = len(similarities)
    if batch - 1 < last_rank:
        raise ValueError(f"last_rank: {last_rank}, but a batch of {batch} on a rank has {batch - 1} negatives an image")
    itself = torch.eye(batch, dtype=torch.bool, device=similarities.device)
    hardest = similarities.masked_fill(itself, -torch.inf).topk(last_rank, dim=1).values
    return hardest[:, first_rank - 1 :].mean(dim=1)


def median_rank(num_negatives: int) -> int:
    """Return the rank, counted from 1, of the lower median, which torch's `median` takes too."""
    return (num_negatives - 1) // 2 + 1


def true_negative_probability(rank: int, *, num_negatives: int, num_classes: int) -> float:
    """Return how likely the negative of a rank is of another class than the anchor, if its own class ranks first.

    Each negative is of the anchor's class with probability p = 1 / classes, so that the number of false ones is
    binomial: the sum over i < rank of C(n, i) p^i (1 - p)^(n - i).

    Source: the argument of Wang et al. 2021, arXiv:2104.08760, for balanced classes.
    """
    return math.fsum(islice(_num_false_negatives(num_negatives, num_classes), rank))


def safe_rank(probability: float, *, num_negatives: int, num_classes: int) -> int:
    """Return the lowest rank that is a true negative with this probability; the last one, if none is."""
    sums = accumulate(islice(_num_false_negatives(num_negatives, num_classes), num_negatives - 1))
    return next((rank for rank, total in enumerate(sums, start=1) if total >= probability), num_negatives)


def _num_false_negatives(num_negatives: int, num_classes: int) -> Iterator[float]:
    """Yield the probability of 0, 1, ... false negatives; in logarithms, as the binomials exceed a float."""
    log_p, log_rest = -math.log(num_classes), math.log1p(-1 / num_classes)
    for i in range(num_negatives + 1):
        log_ways = math.lgamma(num_negatives + 1) - math.lgamma(i + 1) - math.lgamma(num_negatives - i + 1)
        yield math.exp(log_ways + i * log_p + (num_negatives - i) * log_rest)
