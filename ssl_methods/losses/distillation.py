"""Distillation of embeddings: put the student's where the teacher's is."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.precision import in_full_precision


@in_full_precision
def distillation_loss(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return the squared distance of unit vectors, 2 - 2 cosine, averaged over the global batch.

    Args:
        student: embeddings, any length (normalised here).
        teacher: embeddings of the same views, any length (normalised here). No gradient reaches them.

    Returns:
        A number in [0, 4], 0 for equal directions; the same number, exact gradient, on every rank.

    Differs from the authors' code, which sums over a rank's part of the batch: there the weight of this term against
    another one grows with that part's size. This mean times that size is their sum.

    Source: Gao et al. 2022, arXiv:2104.09124, the distillation term.
    """
    difference = F.normalize(student, dim=1) - F.normalize(teacher.detach(), dim=1)
    total = all_reduce_sum(difference.square().sum())
    return total / all_reduce_sum(total.new_tensor(len(student)))
