"""Plain torch DDP: the yardstick of the DeepSpeed engine, and the choice where DeepSpeed cannot be installed."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrate.config.run import RunConfig
from orchestrate.engine.gradients import GradientRules
from orchestrate.engine.layout import OptimizerState, WholeLayout, trained_names
from orchestrate.engine.optim import build_optimizer
from orchestrate.engine.precision import Forward, LossScale
from orchestrate.engine.ranks import Ranks
from ssl_methods.method import Method, StepOutput


class DdpEngine:
    """Train with gradients averaged by DistributedDataParallel."""

    sharded = False

    def __init__(self, config: RunConfig, method: Method, ranks: Ranks) -> None:
        self.method = method
        self.loss_scale = LossScale(dynamic=config.train.precision == "fp16")
        self.optimizer = build_optimizer(
            config.optim, method, global_batch=config.train.global_batch, last_layer=method.last_layer()
        )
        self._rules = GradientRules(
            config.optim,
            self.optimizer,
            loss_scale=self.loss_scale,
            names=trained_names(self.optimizer, method),
            device=ranks.device,
            sharded=False,
        )
        self._layout = WholeLayout(self.optimizer, method)
        self._model = averaging(Forward(method, config.train.precision, ranks.device))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""
        output: StepOutput = self._model(views, labels)
        return output

    def update(self, output: StepOutput) -> dict[str, float]:
        """Average the gradients over the ranks and take one optimizer step."""
        self.loss_scale.scaled(output.loss).backward()  # type: ignore[no-untyped-call]
        facts = {} if self._rules.idle else self._rules.apply(self._layout.slices())
        if not facts.get("skipped"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return facts

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state."""
        return self._layout.optimizer_state()

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned."""
        self._layout.load_optimizer_state(state)

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh."""
        self._layout.forget_optimizer_state()

    def whole(self) -> AbstractContextManager[None]:
        """Do nothing: parameters are whole."""
        return self._layout.whole()


def averaging(module: nn.Module) -> DistributedDataParallel:
    """Let a module's gradients be averaged over the ranks during the backward pass.

    Buffers are not synced at each forward pass: what must be equal is computed over the ranks.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before 2.14
    options: dict[str, Any] = {option: False}
    # Without find_unused_parameters, DDP packs its buckets anew after the first backward pass, in the order in which
    # gradients came. A resume would begin with the first packing again, and sums of over two ranks round by packing.
    # With it, a parameter may also be without gradient in a step; torch warns once that it may be needless.
    return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=True, **options)
