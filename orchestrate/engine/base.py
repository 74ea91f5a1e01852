"""Engine: a Method made trainable over ranks."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orchestrate.config.run import RunConfig
from orchestrate.engine.ranks import Ranks
from ssl_methods.method import Method, StepOutput

# State of the optimizer by parameter name: {"encoder.conv1.weight": {"momentum_buffer": tensor}}.
# It has whole tensors, so that any engine on any number of ranks can go on from it.
OptimizerState = dict[str, dict[str, Tensor]]


class Engine(Protocol):
    """Forward, update, and hand out or take back everything the next step depends on."""

    method: Method
    optimizer: Any  # has param_groups
    sharded: bool  # whether each rank holds a part of the optimizer state

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""

    def update(self, output: StepOutput) -> None:
        """Average the gradients over the ranks and take one optimizer step."""

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state on the CPU; every rank must call it if the engine is sharded."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned, after the weights were loaded; every rank must call it."""


def build_engine(config: RunConfig, method: Method, ranks: Ranks) -> Engine:
    """Wrap a method, which already is on its device, in the engine its config names."""
    if config.system.engine == "ddp":
        from orchestrate.engine.ddp import DdpEngine

        return DdpEngine(config, method, ranks)
    from orchestrate.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, method, ranks)


def unsharded_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> OptimizerState:
    """Copy the state of an optimizer that holds the module's own parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: {key: value.detach().cpu().clone() for key, value in values.items() if torch.is_tensor(value)}
        for parameter, values in optimizer.state.items()
    }


def load_unsharded_state(optimizer: torch.optim.Optimizer, module: nn.Module, state: OptimizerState) -> None:
    """Put back what `unsharded_state` copied."""
    for name, parameter in module.named_parameters():
        if name in state:
            # Counters stay where the optimizer keeps them: on the CPU.
            optimizer.state[parameter] = {
                key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                for key, value in state[name].items()
            }
