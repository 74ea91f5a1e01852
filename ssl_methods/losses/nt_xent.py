"""NT-Xent: tell an image's other view from all other images of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum, gather, rank
from ssl_methods.precision import in_full_precision


@in_full_precision
def nt_xent_loss(
    z1: Float[Tensor, "batch dim"], z2: Float[Tensor, "batch dim"], *, temperature: float
) -> Float[Tensor, ""]:
    """Classify each embedding's positive among the other 2 x global batch - 1 embeddings.

    Args:
        z1: projections of one view of the images, any length (normalised here).
        z2: projections of the other view of the same images.
        temperature: divides the cosine similarities (tau).

    Returns:
        Cross-entropy averaged over both directions and the global batch; the same number on every rank.

    Over ranks: each rank scores its own rows against everybody's columns (2b x 2N), batches must be equal, and the
    gradient is exact.

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1.
    """
    queries = F.normalize(torch.cat([z1, z2]), dim=1)
    keys = gather(queries)
    num_rows, half = len(queries), len(z1)
    row = torch.arange(num_rows, device=queries.device)
    first = rank() * num_rows
    logits = (queries @ keys.T / temperature).index_put((row, row + first), queries.new_tensor(-torch.inf))
    positive = (row + half) % num_rows + first
    return all_reduce_sum(F.cross_entropy(logits, positive, reduction="sum")) / len(keys)
