"""EsViT's region loss: let each region of a student's crop predict what the teacher sees in the likest region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ssl_methods.collectives import all_reduce_sum
from ssl_methods.indicators import entropy
from ssl_methods.precision import in_full_precision

_CHUNK = 2**24  # logits that are worked on at a time: 64 MB in fp32


class RegionLoss(NamedTuple):
    """The loss, and signs of collapse in this rank's part of the batch.

    Attributes:
        loss: cross-entropy of teacher and student, nats.
        entropy, imbalance: of the teacher's distributions of regions, as in `DinoLoss`.
        distinct: how many regions of a teacher's crop are the likest of some region of a student's crop, as a share
            of as many as could be. 1: each has another; near 0: one region is the likest of all.
    """

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    imbalance: Float[Tensor, ""]
    distinct: Float[Tensor, ""]


def region_loss(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "large_crops batch regions classes"],
    *,
    student_features: Sequence[Float[Tensor, "batch _ dim"]],
    teacher_features: Float[Tensor, "large_crops batch regions dim"],
    centre: Float[Tensor, " classes"],
    student_temperature: float,
    teacher_temperature: float,
) -> RegionLoss:
    """Match each region of each of the student's crops with one of each other large crop, and compare distributions.

    Crops may have any numbers of regions. Several regions may have the same match; features take no gradient.

    Memory: at 224 and 96 px an image has 2 x 49 + 8 x 9 = 170 regions of the student and 98 of the teacher, with
    65536 classes each. So 32 images make 1.4 GB of student's logits in fp32, 0.8 GB of targets. What is made beside
    them is a gradient as large as the logits: no matched copy of the targets, no logarithm of a softmax is kept, and
    logits in half precision are widened a part at a time.

    Args:
        student: logits of all regions: of the first crop's first image, then of its other images and the other crops.
            The large crops come first, in the teacher's order; two crops at least.
        teacher: logits of the large crops' regions. They are targets: no gradient reaches them.
        student_features, teacher_features: of the backbone, for each crop; of any length.
        centre: subtracted from the teacher's logits (c').
        student_temperature: divides the student's logits (tau_s).
        teacher_temperature: divides the teacher's centred logits (tau_t).

    Returns:
        Cross-entropy averaged over a crop's regions, pairs of different crops and the global batch: the same number,
        exact gradient, on every rank.

    Source: Li et al. 2022, arXiv:2106.09785, eq. 2-3; averaged over pairs as in the authors' code.
    """
    matches = [[match_regions(crop, large) for crop in student_features] for large in teacher_features]
    targets = _targets(teacher, centre, teacher_temperature)
    num_large, batch, num_regions, _ = teacher.shape
    shares = torch.cat([targets.new_full((batch * each.shape[1],), 1 / each.shape[1]) for each in student_features])
    rows = _rows_of_targets(matches, num_regions)
    total = _MatchedCrossEntropy.apply(student, targets, rows, shares, student_temperature)
    num_pairs = num_large * (len(student_features) - 1)
    loss = all_reduce_sum(total) / (all_reduce_sum(total.new_tensor(batch)) * num_pairs)
    imbalance = math.log(targets.shape[-1]) - entropy(targets.mean(dim=0))
    return RegionLoss(loss, _mean_entropy(targets), imbalance, _distinct(matches, num_regions))


@torch.no_grad()
@in_full_precision
def match_regions(
    student: Float[Tensor, "batch regions dim"], teacher: Float[Tensor, "batch teacher_regions dim"]
) -> Int[Tensor, "batch regions"]:
    """Return for each region the teacher's of the same image that has the largest cosine, the first of equals."""
    cosines = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2)
    return cosines.argmax(dim=2)


@torch.no_grad()
def _targets(logits: Tensor, centre: Tensor, temperature: float) -> Float[Tensor, "rows classes"]:
    with torch.autocast(logits.device.type, enabled=False):
        shifted = logits.flatten(0, 2).to(centre.dtype, copy=True).sub_(centre).div_(temperature)
        return F.softmax(shifted, dim=-1)


def _rows_of_targets(
    matches: Sequence[Sequence[Int[Tensor, "batch _"]]], num_regions: int
) -> Int[Tensor, "large_crops rows"]:
    """Say which row of the targets belongs to which of the student's, for each large crop; -1 for the crop itself."""
    rows = []
    for large, of_crops in enumerate(matches):
        batch = len(of_crops[0])
        first = (large * batch + torch.arange(batch, device=of_crops[0].device)) * num_regions
        rows.append(
            torch.cat(
                [
                    torch.full_like(found, -1).flatten() if crop == large else (first[:, None] + found).flatten()
                    for crop, found in enumerate(of_crops)
                ]
            )
        )
    return torch.stack(rows)


def _distinct(matches: Sequence[Sequence[Int[Tensor, "batch _"]]], num_regions: int) -> Float[Tensor, ""]:
    shares = []
    for large, of_crops in enumerate(matches):
        for crop, found in enumerate(of_crops):
            if crop != large:
                taken = found.new_zeros(len(found), num_regions).scatter_(1, found, 1)
                shares.append(taken.sum(dim=1).float().mean() / min(num_regions, found.shape[1]))
    return torch.stack(shares).mean()


def _mean_entropy(targets: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
    return torch.cat([entropy(part) for part in torch.split(targets, _rows_at_a_time(targets))]).mean()


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, _CHUNK // logits.shape[1])


class _MatchedCrossEntropy(Function):
    """Sum over rows and their targets of share * -sum(target * log softmax(logits / temperature)), a part at a time."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor, shares: Tensor, temperature: float
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(logits, targets, rows, shares)
        ctx.temperature = temperature
        total = targets.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):
            for part in _parts(logits):
                log_probabilities = F.log_softmax(logits[part].to(targets.dtype) / temperature, dim=1)
                agreement = (_combined(targets, rows[:, part]) * log_probabilities).sum(dim=1)
                total -= (shares[part] * agreement).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, rows, shares = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for part in _parts(logits):
            # of each row: as many probabilities of the student's as it has targets, less these targets
            probabilities = F.softmax(logits[part].to(targets.dtype) / ctx.temperature, dim=1)
            surplus = probabilities.mul_((rows[:, part] >= 0).sum(dim=0)[:, None])
            surplus -= _combined(targets, rows[:, part])
            grad_logits[part] = surplus.mul_((shares[part] * (grad / ctx.temperature))[:, None])
        return grad_logits, None, None, None, None


def _parts(logits: Tensor) -> list[slice]:
    step = _rows_at_a_time(logits)
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def _combined(targets: Tensor, rows: Int[Tensor, "large_crops part"]) -> Float[Tensor, "part classes"]:
    """Sum the targets of each row; -1 has none."""
    total = targets.new_zeros(rows.shape[1], targets.shape[1])
    for each in rows:
        total.addcmul_(targets[each.clamp(min=0)], (each >= 0).to(targets.dtype)[:, None])
    return total
