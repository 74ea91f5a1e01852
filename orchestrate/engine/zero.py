"""ZeRO 1 and 2: parameters are whole, each rank holds its part of the averaged gradients and of the optimizer state.

For each parameter group DeepSpeed keeps one flat vector of all its parameters, cut into equal parts, a part a rank.
`round_robin_bit16_offsets` says where each parameter begins in the flat vector.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrate.engine.gradients import GradientSlice
from orchestrate.engine.layout import OptimizerState, gathered, names_of


class PartitionedLayout:
    """What lies on this rank under ZeRO 1 and 2.

    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2.
        module: whose parameters it trains, all fp32.
    """

    def __init__(self, zero: Any, module: nn.Module) -> None:
        self._zero = zero
        self._names = names_of(module)
        # DeepSpeed keeps a second copy of each rank's part for models in half precision. Ours are fp32, so the copy
        # is made the part itself: less memory, and what a method changes in its parameters is not undone by a step.
        for copy, parts in zip(
            zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
        ):
            copy.data = parts[dist.get_rank()]
        zero._link_all_hp_params()  # its own views of the copy

    def slices(self) -> list[GradientSlice]:
        """Hand out this rank's parts of the averaged gradients."""
        zero, rank = self._zero, dist.get_rank()
        slices = []
        for index, group in enumerate(zero.param_groups):
            weights = zero.single_partition_of_fp32_groups[index].detach()
            begins = zero.grad_partition_insertion_offset[index][rank]
            # Padding follows the last parameter and belongs to none.
            parts = zip(zero.params_in_partition[index], zero.averaged_gradients[index], strict=False)
            for parameter, part in parts:
                gradient = part.view(-1)
                weight = weights.narrow(0, int(begins[zero.get_param_id(parameter)]), gradient.numel())
                slices.append(GradientSlice(self._names[parameter], gradient, weight, group))
        return slices

    def discard_gradients(self) -> None:
        """Forget the gradients, as DeepSpeed's own step does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None

    def optimizer_state(self) -> OptimizerState:
        """Gather the ranks' parts of the optimizer state on the CPU of rank 0; the others return nothing."""
        zero = self._zero
        state: OptimizerState = {}
        for index, (group, part) in enumerate(
            zip(zero.param_groups, zero.single_partition_of_fp32_groups, strict=True)
        ):
            values = {} if group["still"] else zero.optimizer.state.get(part, {})
            for key, value in values.items():
                if not torch.is_tensor(value):
                    continue
                parts = gathered(value) if value.shape == part.shape else None
                if dist.get_rank() != 0:
                    continue
                flat = None if parts is None else torch.cat(parts).cpu()
                for name, parameter, offset in self._places(index):
                    whole = value if flat is None else flat[offset : offset + parameter.numel()].view(parameter.shape)
                    state.setdefault(name, {})[key] = whole.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take this rank's parts of a whole optimizer state."""
        for index, part in enumerate(self._zero.single_partition_of_fp32_groups):
            self._zero.optimizer.state[part] = self._part_of(state, index, part)

    def _part_of(self, state: OptimizerState, index: int, part: Tensor) -> dict[str, Tensor]:
        flats: dict[str, Tensor] = {}
        for name, parameter, offset in self._places(index):
            for key, value in state.get(name, {}).items():
                if value.ndim == 0 and parameter.ndim != 0:
                    flats[key] = value.clone()
                    continue
                flat = flats.setdefault(key, torch.zeros(part.numel() * dist.get_world_size(), dtype=part.dtype))
                flat[offset : offset + parameter.numel()] = value.reshape(-1)
        begin = part.numel() * dist.get_rank()
        return {
            key: flat if flat.ndim == 0 else flat[begin : begin + part.numel()].to(part.device, copy=True)
            for key, flat in flats.items()
        }

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh, and free what it had kept."""
        self._zero.optimizer.state.clear()
        # DeepSpeed keeps views of the state by parameter, taken at the first step: without this they would hold the
        # old state in memory for ever.
        for parameter in self._names:
            if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                mapping.optim_fragment = None
        self._zero._hp_optimizer_states_linked = False

    def _places(self, index: int) -> list[tuple[str, nn.Parameter, int]]:
        """Say where each parameter of a group begins in the flat vector."""
        zero = self._zero
        parameters, offsets = zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index]
        return [(self._names[each], each, int(offset)) for each, offset in zip(parameters, offsets, strict=True)]

    def whole(self) -> AbstractContextManager[None]:
        """Do nothing: parameters are whole."""
        return nullcontext()
