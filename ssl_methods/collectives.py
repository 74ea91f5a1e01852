"""Sums, concatenations, permutations and batch norm over ranks, with exact gradients; one process needs no group.

Convention: every rank computes a loss and the engine averages parameter gradients over ranks. A collective's backward
therefore sums the gradients of all ranks' losses, and the average is the gradient of the mean of these losses.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

SomeModule = TypeVar("SomeModule", bound=nn.Module)


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first axis, in rank order.

    Shapes must be equal on all ranks. Call it on every rank, in the same order.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum the tensors of all ranks; the same bits on every rank. Call it on every rank, in the same order."""
    if world_size() == 1:
        return x
    total: Tensor = _AllReduceSum.apply(x)
    return total


def shared_permutation(count: int, *, device: torch.device) -> Int[Tensor, " count"]:
    """Draw a random order of `count` things, the same on every rank. Call it on every rank, in the same order.

    It comes from rank 0's CPU generator of torch, so that restoring that one's state brings it back; the other ranks'
    generators stay as they are.
    """
    order = torch.randperm(count) if rank() == 0 else torch.empty(count, dtype=torch.int64)
    order = order.to(device)
    if world_size() > 1:
        dist.broadcast(order, src=0)
    return order


def standardise(x: Float[Tensor, "batch channels"], *, epsilon: float) -> Float[Tensor, "batch channels"]:
    """Return x with zero mean and unit biased variance over the global batch: batch norm without weights or memory.

    Args:
        x: this rank's samples; ranks may hold different numbers of them.
        epsilon: added to the variance.
    """
    if world_size() == 1:
        return F.batch_norm(x, None, None, training=True, eps=epsilon)
    standardised: Tensor = _NormaliseOverRanks.apply(x, None, None, epsilon)[0]
    return standardised


class RankBatchNorm(_BatchNorm):
    """Batch norm over the global batch, on any backend and device; what `nn.SyncBatchNorm` cannot do on CPUs.

    Statistics and their arithmetic are fp32 (float64 inputs: float64). Ranks may hold different numbers of samples.
    In evaluation and on one process it is `nn.BatchNorm`, whose parameters, buffers and state dict it shares.
    """

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Normalise with the moments of the global batch, and update the running ones."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        output, mean, variance, count = _NormaliseOverRanks.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update_running(mean, variance * count / (count - 1))
        normalised: Tensor = output
        return normalised

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum None asks for the plain average over all batches
        share = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes (batch, channels, ...), got shape {tuple(input.shape)}")


class RankBatchNormAct(RankBatchNorm):
    """Batch norm over ranks, then the dropout and activation that timm keeps inside its batch norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Normalise, drop, activate."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def synchronise_batch_norm(module: SomeModule) -> SomeModule:
    """Replace every batch norm inside `module`, in place, by one over all ranks.

    Names, parameters and buffers stay the same objects, so state dicts and optimisers keep working.

    Raises:
        TypeError: a batch norm of an unknown subclass, whose extra work would be lost.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, RankBatchNorm):
                setattr(parent, name, _over_ranks(child))
    return module


def _over_ranks(norm: _BatchNorm) -> RankBatchNorm:
    shape: dict[str, Any] = {"eps": norm.eps, "momentum": norm.momentum, "affine": norm.affine}
    shape["track_running_stats"] = norm.track_running_stats
    if hasattr(norm, "drop") and hasattr(norm, "act"):
        replaced: RankBatchNorm = RankBatchNormAct(norm.num_features, **shape)
        replaced.drop, replaced.act = norm.drop, norm.act
    elif type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        replaced = RankBatchNorm(norm.num_features, **shape)
    else:
        raise TypeError(f"{type(norm).__name__}: cannot be synchronised over ranks; use nn.BatchNorm1d, 2d or 3d")
    replaced.weight, replaced.bias = norm.weight, norm.bias
    replaced.running_mean, replaced.running_var = norm.running_mean, norm.running_var
    replaced.num_batches_tracked = norm.num_batches_tracked
    return replaced.train(norm.training)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return torch.cat(_exchange(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        # all-reduce, then take our part: every backend has it, and what a loss gathers is small
        return _sum_over_ranks(grad).tensor_split(world_size())[rank()]


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _sum_over_ranks(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _sum_over_ranks(grad)


class _NormaliseOverRanks(Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, moments of the global batch.

    One collective a pass: forward the table of (mean, variance, count) of all ranks, from which the global moments
    follow without the cancellation of a sum of squares (Chan et al. 1983); backward the two sums of the chain rule.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _global_moments(x)
        weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        inverse_std = torch.rsqrt(variance + ctx.eps)
        # torch's kernel for fixed moments, then what the moments' dependence on x takes away: affine in x, so a
        # batch norm again. CUDA wants the saved moments too, even where it does not use them.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, inverse_std, False, ctx.eps, [True, True, True]
        )
        slope, offset = _sum_over_ranks(torch.stack([grad_weight, grad_bias])) / count * weight
        grad_x -= F.batch_norm(x, mean, variance, slope * inverse_std, offset * inverse_std, eps=ctx.eps)
        affine = ctx.needs_input_grad[1]
        return grad_x, grad_weight if affine else None, grad_bias if affine else None, None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    # the moments inside torch's own batch norm: biased variance in two passes, 20 times faster than var_mean on CPUs
    mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
    count = torch.full_like(mean, x.numel() / x.shape[1])
    means, variances, counts = torch.stack(_exchange(torch.stack([mean, variance, count])), dim=1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / total, total


def _exchange(x: Tensor) -> list[Tensor]:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return parts


def _sum_over_ranks(x: Tensor) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total)
    return total
