"""How parameters, gradients and optimizer state lie on a rank."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrate.engine.gradients import GradientSlice

# State of the optimizer by parameter name: {"encoder.conv1.weight": {"momentum_buffer": tensor}}.
# It has whole tensors, so that any engine on any number of ranks can go on from it.
OptimizerState = dict[str, dict[str, Tensor]]


class Layout(Protocol):
    """Hand out what lies on this rank by the names of parameters, and take it back."""

    def slices(self) -> list[GradientSlice]:
        """Hand out the averaged gradients, after a backward pass."""

    def discard_gradients(self) -> None:
        """Forget the gradients, so that no step need be taken with them."""

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state, less that of layers that are held still.

        Where each rank holds a part, every rank must call it: it is whole on rank 0 and empty on the others.
        Its tensors may be the optimizer's own: copy what must outlive the next step.
        """

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take copies of what `optimizer_state` returned, after the weights were loaded."""

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh, as if no step had been taken."""

    def whole(self) -> AbstractContextManager[None]:
        """Hold whole parameters inside."""


class WholeLayout:
    """Every rank holds everything: DDP and ZeRO 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self._optimizer = optimizer
        self._names = names_of(module)

    def slices(self) -> list[GradientSlice]:
        """Hand out the averaged gradients."""
        return [
            GradientSlice(self._names[parameter], parameter.grad, parameter.detach(), group)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def discard_gradients(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's own tensors."""
        states = self._optimizer.state
        return {
            self._names[parameter]: tensors_of(states[parameter])
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter in states and not group["still"]
        }

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take copies of what `optimizer_state` returned."""
        for parameter, name in self._names.items():
            self._optimizer.state.pop(parameter, None)
            if name in state:
                # Counters stay where the optimizer keeps them: on the CPU.
                self._optimizer.state[parameter] = {
                    key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                    for key, value in state[name].items()
                }

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh."""
        self._optimizer.state.clear()

    def whole(self) -> AbstractContextManager[None]:
        """Do nothing: parameters are whole."""
        return nullcontext()


def names_of(module: nn.Module) -> dict[Tensor, str]:
    """Return the name of every parameter of a module."""
    return {parameter: name for name, parameter in module.named_parameters()}


def trained_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Name the parameters of an optimizer in its own order."""
    names = names_of(module)
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def gathered(part: Tensor) -> list[Tensor]:
    """Return the parts of all ranks, which are of one shape."""
    parts = [torch.empty_like(part, requires_grad=False) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    return parts


def tensors_of(state: dict[str, object]) -> dict[str, Tensor]:
    """Pick the tensors of one parameter's optimizer state."""
    return {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
