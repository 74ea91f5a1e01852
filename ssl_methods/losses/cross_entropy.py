"""Cross-entropy with labels over the global batch."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float, Int
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.precision import in_full_precision


@in_full_precision
def cross_entropy_loss(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Return the cross-entropy averaged over the global batch; the same number, exact gradient, on every rank.

    Args:
        logits: unnormalised log-probabilities.
        labels: class indices.
        label_smoothing: share of the target spread evenly over all classes.
    """
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return all_reduce_sum(total) / all_reduce_sum(total.new_tensor(len(labels)))
