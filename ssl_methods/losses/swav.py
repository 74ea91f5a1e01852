"""SwAV: predict, from a crop, to which prototypes another crop of the image is assigned."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum, gather
from ssl_methods.precision import in_full_precision


@in_full_precision
def swav_loss(
    scores: Float[Tensor, "crops batch prototypes"],
    codes: Float[Tensor, "large_crops batch prototypes"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Let each crop predict the code of each other large crop of its image.

    Args:
        scores: cosines of all crops with the prototypes, the large crops first, in the codes' order; two at least.
        codes: assignments of the large crops, see `sinkhorn`. They are targets: no gradient reaches them.
        temperature: divides the scores (tau).

    Returns:
        Cross-entropy averaged over the pairs of different crops and the global batch: the same number, exact
        gradient, on every rank. Two large crops of S in all make 2 (S - 1) pairs.

    Source: Caron et al. 2020, arXiv:2006.09882, eq. 2 and 6; averaged over pairs as in the authors' code.
    """
    log_probabilities = F.log_softmax(scores / temperature, dim=-1)
    # what all crops say together, less what the large crop says of itself
    others = log_probabilities.sum(dim=0) - log_probabilities[: len(codes)]
    total = (codes.detach() * others).sum()
    sums = all_reduce_sum(torch.stack([total, total.new_full((), scores.shape[1])]))
    return -sums[0] / (sums[1] * len(codes) * (len(scores) - 1))


@torch.no_grad()
@in_full_precision
def sinkhorn(
    scores: Float[Tensor, "crops rows prototypes"], *, epsilon: float, iterations: int
) -> Float[Tensor, "crops rows prototypes"]:
    """Assign samples to prototypes softly, so that all prototypes are used about equally; each crop by itself.

    Args:
        scores: cosines of samples with the prototypes. A row of -inf takes no part, and gets a code of zeros.
        epsilon: smoothness of the codes; lower is sharper.
        iterations: how often prototypes, then samples, are scaled to equal sums; one at least.

    Returns:
        Codes: rows that sum to 1. Detached. Over ranks: as of all ranks' rows in one process; ranks may hold
        different numbers of rows.

    Source: Caron et al. 2020, arXiv:2006.09882, eq. 3-5; Cuturi 2013, arXiv:1306.0895.
    """
    # any constant of a crop cancels in the codes; with this one nothing overflows
    highest = gather(scores.amax(dim=(1, 2)).view(1, -1)).amax(dim=0)
    kernel = torch.exp((scores - highest.view(-1, 1, 1)) / epsilon)
    per_sample = kernel.new_ones(*kernel.shape[:2], 1)
    per_prototype = kernel.new_ones(len(kernel), kernel.shape[2], 1)
    for _ in range(iterations):
        per_prototype = _reciprocal(all_reduce_sum(kernel.mT @ per_sample))
        per_sample = _reciprocal(kernel @ per_prototype)
    return kernel.mul_(per_sample).mul_(per_prototype.mT)


def _reciprocal(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny).reciprocal()
