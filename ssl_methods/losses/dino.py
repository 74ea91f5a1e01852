"""DINO: let the student's crops predict what the teacher sees in other crops of the image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.indicators import entropy
from ssl_methods.precision import in_full_precision


class DinoLoss(NamedTuple):
    """The loss, and two signs of collapse in this rank's part of the teacher's distributions, in nats.

    Attributes:
        loss: cross-entropy of teacher and student.
        entropy: mean entropy of the teacher's distributions. 0: each is one class; ln(classes): none says anything.
        imbalance: divergence of their mean from the uniform distribution. 0: all classes are used evenly;
            ln(classes): one class takes all. Fewer samples than classes keep it above 0.
    """

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    imbalance: Float[Tensor, ""]


@in_full_precision
def dino_loss(
    student: Float[Tensor, "crops batch classes"],
    teacher: Float[Tensor, "large_crops batch classes"],
    *,
    centre: Float[Tensor, " classes"],
    student_temperature: float,
    teacher_temperature: float,
) -> DinoLoss:
    """Let each of the student's crops predict the teacher's distribution over classes for each other large crop.

    Args:
        student: logits of all crops, the large ones first, in the teacher's order; two at least.
        teacher: logits of the large crops. They are targets: no gradient reaches them.
        centre: subtracted from the teacher's logits (c), against one class taking all; see `updated_centre`.
        student_temperature: divides the student's logits (tau_s).
        teacher_temperature: divides the teacher's centred logits (tau_t); lower is sharper.

    Returns:
        Cross-entropy averaged over the pairs of different crops and the global batch: the same number, exact
        gradient, on every rank. Two large crops of S in all make 2 (S - 1) pairs.

    Source: Caron et al. 2021, arXiv:2104.14294, eq. 3 and algorithm 1; averaged over pairs as in the authors' code.
    """
    targets = F.softmax((teacher.detach() - centre) / teacher_temperature, dim=-1)
    log_probabilities = F.log_softmax(student / student_temperature, dim=-1)
    # what all crops say together, less what the large crop says of itself; a matrix product would be faster, but its
    # long fp32 sums are off by 1e-3 near uniform
    others = log_probabilities.sum(dim=0) - log_probabilities[: len(targets)]
    sums = all_reduce_sum(torch.stack([(targets * others).sum(), others.new_full((), student.shape[1])]))
    loss = -sums[0] / (sums[1] * len(targets) * (len(student) - 1))
    imbalance = math.log(targets.shape[-1]) - entropy(targets.mean(dim=(0, 1)))
    return DinoLoss(loss, entropy(targets).mean(), imbalance)


@torch.no_grad()
@in_full_precision
def updated_centre(
    centre: Float[Tensor, " classes"], teacher: Float[Tensor, "large_crops batch classes"], *, momentum: float
) -> Float[Tensor, " classes"]:
    """Move the centre towards the mean of the teacher's logits over the global batch; the same bits on every rank.

    Source: Caron et al. 2021, arXiv:2104.14294, eq. 4.
    """
    rows = teacher.flatten(0, 1)
    sums = all_reduce_sum(torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))]))
    return centre.lerp(sums[:-1] / sums[-1], 1.0 - momentum)
