"""Less memory for more compute: activations of the backbone are made again in the backward pass instead of kept.

Two ways, which may be combined; neither changes the loss:

- `recompute_blocks`: each residual block keeps its input only (Chen et al. 2016, arXiv:1604.06174).
- `recompute_in_parts`: a few images at a time go through the backbone, the loss sees all of them, and the backward pass
  makes one part's activations at a time. This is gradient caching (Gao et al. 2021, arXiv:2101.06983): unlike plain
  gradient accumulation it is exact for losses that couple the images of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ssl_methods.backbone import Encoded, TokenBackbone

_STACKS = (nn.Sequential, nn.ModuleList)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def recompute_blocks(network: nn.Module) -> int:
    """Make every residual block of a network keep its input only; return the number of blocks found.

    Call it once, on the network that is trained; copies made later share the original's blocks.
    """
    blocks = residual_blocks(network)
    for block in blocks:
        block.forward = _recomputed(block, block.forward)  # in place: the names of weights stay
    return len(blocks)


def recompute_in_parts(network: nn.Module, size: int) -> None:
    """Let at most `size` images at a time through a network while it is trained.

    The gradient is that of the whole batch up to rounding; memory holds the activations of one part.

    Raises:
        ValueError: the network has a batch norm, which would see the parts instead of the batch.
    """
    if norm := batch_coupling(network):
        raise ValueError(f"{norm} sees the whole batch, so parts of it would change the loss")
    name = "encode" if isinstance(network, TokenBackbone) else "forward"  # which forward calls
    whole: Callable[[Tensor], Any] = getattr(network, name)
    part_of = _recomputed(network, whole)

    def in_parts(images: Tensor) -> Any:
        if not (network.training and torch.is_grad_enabled()):
            return whole(images)
        parts = [part_of(part) for part in torch.split(images, size)]
        return torch.cat(parts) if name == "forward" else Encoded(*map(torch.cat, zip(*parts, strict=True)))

    setattr(network, name, in_parts)  # in place: the names of weights stay


def batch_coupling(network: nn.Module) -> str:
    """Name the first layer whose output for an image depends on the other images of the batch; empty if none does."""
    norms = (
        f"{name} ({type(each).__name__})" for name, each in network.named_modules() if isinstance(each, _BatchNorm)
    )
    return next(norms, "")


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    """List the blocks of a network: modules of two or more layers with weights, in a stack (Sequential or ModuleList).

    Of nested ones the innermost that is one of several of its kind.
    """
    blocks: list[nn.Module] = []
    for child in network.children():
        alone = isinstance(network, _STACKS) and not isinstance(child, _STACKS) and _num_layers(child) > 1
        blocks += [child] if alone and not _holds_a_stack_of_blocks(child) else residual_blocks(child)
    return blocks


def _recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_held(module)

    def recomputed(*inputs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    return recomputed


@contextmanager
def _running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch twice when it is computed twice."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    before = [
        (norm, norm.momentum, norm.num_batches_tracked.clone())
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]  # chosen above


def _holds_a_stack_of_blocks(module: nn.Module) -> bool:
    stacks = [each for each in module.modules() if isinstance(each, _STACKS)]
    return any(sum(_num_layers(child) > 1 for child in stack.children()) > 1 for stack in stacks)


def _num_layers(module: nn.Module) -> int:
    return sum(isinstance(each, _LAYERS) for each in module.modules())
