"""ZeRO 3: each rank holds its part of every parameter, of its averaged gradient and of its optimizer state.

DeepSpeed cuts each parameter into equal parts, a part a rank; the last ones may be padded. For each parameter group it
keeps one flat vector of this rank's parts, which is what the optimizer moves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrate.engine.gradients import GradientSlice
from orchestrate.engine.layout import OptimizerState, gathered, names_of


class ScatteredLayout:
    """What lies on this rank under ZeRO 3.

    Args:
        zero: DeepSpeed's optimizer of stage 3.
        module: whose parameters it trains, all fp32.
        gather: DeepSpeed's `GatheredParameters`.
    """

    def __init__(self, zero: Any, module: nn.Module, gather: Callable[..., AbstractContextManager[None]]) -> None:
        self._zero, self._module, self._gather = zero, module, gather
        self._names = names_of(module)
        self._inside = False
        # The optimizer's copy of the parts is for models in half precision; ours are fp32. See `PartitionedLayout`.
        for copy, parts in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            copy.data = parts.data
        # DeepSpeed takes the norm of all gradients at every step, and skips a step in silence if it is not finite.
        zero._get_norm_groups = lambda: [torch.zeros(())]

    def slices(self) -> list[GradientSlice]:
        """Hand out this rank's parts of the averaged gradients, without padding."""
        slices = []
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            parts = zip(self._places(index), self._zero.averaged_gradients[index], strict=True)
            for (name, parameter, offset), gradient in parts:
                size = _own_size(parameter)
                if size > 0:
                    weight = flat.detach().narrow(0, offset, size)
                    slices.append(GradientSlice(name, gradient.narrow(0, 0, size), weight, self._group(index)))
        return slices

    def discard_gradients(self) -> None:
        """Forget the gradients and let go of what was gathered, as the begin of DeepSpeed's own step does."""
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients = {}

    def optimizer_state(self) -> OptimizerState:
        """Gather the ranks' parts of the optimizer state on the CPU of rank 0; the others return nothing."""
        state: OptimizerState = {}
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            for key, value in self._zero.optimizer.state.get(flat, {}).items():
                if not torch.is_tensor(value):
                    continue
                everywhere = gathered(value) if value.shape == flat.shape else None
                if dist.get_rank() != 0:
                    continue
                parts = None if everywhere is None else [part.cpu() for part in everywhere]
                for name, parameter, offset in self._places(index):
                    whole = value if parts is None else _joined(parts, parameter, offset)
                    state.setdefault(name, {})[key] = whole.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take this rank's parts of a whole optimizer state."""
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            self._zero.optimizer.state[flat] = self._part_of(state, index, flat)

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh."""
        self._zero.optimizer.state.clear()

    def _part_of(self, state: OptimizerState, index: int, flat: Tensor) -> dict[str, Tensor]:
        part: dict[str, Tensor] = {}
        for name, parameter, offset in self._places(index):
            size = _own_size(parameter)
            begin = parameter.partition_numel() * dist.get_rank()
            for key, value in state.get(name, {}).items():
                if value.ndim == 0 and len(parameter.ds_shape) != 0:
                    part[key] = value.clone()
                    continue
                own = part.setdefault(key, torch.zeros_like(flat, requires_grad=False))
                own[offset : offset + size] = value.reshape(-1)[begin : begin + size].to(own.device)
        return part

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all parameters, and scatter what rank 0 made of them."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with self._gather(list(self._module.parameters()), modifier_rank=0):
                yield
        finally:
            self._inside = False

    def _places(self, index: int) -> list[tuple[str, Any, int]]:
        """Say where this rank's part of each parameter of a group begins in the flat vector."""
        places, offset = [], 0
        for parameter in self._zero.fp16_groups[index]:
            places.append((self._names[parameter], parameter, offset))
            offset += parameter.partition_numel()
        return places

    def _group(self, index: int) -> dict[str, Any]:
        group: dict[str, Any] = self._zero.param_groups[self._zero.sub_group_to_group_id[index]]
        return group


def _own_size(parameter: Any) -> int:
    """Count the numbers of a parameter that lie on this rank, without padding."""
    size = int(parameter.partition_numel())
    return max(0, min(size, int(parameter.ds_numel) - size * dist.get_rank()))


def _joined(parts: list[Tensor], parameter: Any, offset: int) -> Tensor:
    size = parameter.partition_numel()
    flat = torch.cat([part[offset : offset + size] for part in parts])
    return flat[: parameter.ds_numel].view(parameter.ds_shape)
