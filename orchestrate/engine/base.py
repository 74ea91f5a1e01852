"""Engine: a Method made trainable over ranks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from orchestrate.config.run import RunConfig
from orchestrate.engine.layout import OptimizerState
from orchestrate.engine.precision import LossScale
from orchestrate.engine.ranks import Ranks
from ssl_methods.method import Method, StepOutput


class Engine(Protocol):
    """Forward, update, and hand out or take back everything the next step depends on."""

    method: Method
    optimizer: Any  # has param_groups
    sharded: bool  # whether each rank holds a part of the optimizer state
    loss_scale: LossScale

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""

    def update(self, output: StepOutput) -> dict[str, float]:
        """Average the gradients over the ranks and take one optimizer step.

        Returns:
            What to log, equal on every rank: `grad_norm` if gradients are clipped or fp16; `loss_scale` and `skipped`
            (1 if gradients overflowed and nothing moved) if fp16.

        Raises:
            DivergedError: on every rank: fp16 gradients overflow whatever the loss scale is.
        """

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state; if the engine is sharded, every rank must call it, and only rank 0 gets it.

        A layer that is held still has none. Tensors may be the optimizer's own: copy what must outlive the next step.
        """

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned, after the weights were loaded; every rank must call it."""

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh, as if no step had been taken; every rank must call it."""

    def whole(self) -> AbstractContextManager[None]:
        """Hold whole parameters inside; what rank 0 changes in them is kept. Every rank must enter it."""


def build_engine(config: RunConfig, method: Method, ranks: Ranks) -> Engine:
    """Wrap a method, which already is on its device, in the engine its config names."""
    if config.system.engine == "ddp":
        from orchestrate.engine.ddp import DdpEngine

        return DdpEngine(config, method, ranks)
    from orchestrate.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, method, ranks)
