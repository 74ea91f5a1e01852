"""Plain torch DDP: the yardstick of the DeepSpeed engine, and the choice where DeepSpeed cannot be installed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from orchestrate.config.run import RunConfig
from orchestrate.engine.base import OptimizerState, load_unsharded_state, unsharded_state
from orchestrate.engine.optim import build_optimizer
from orchestrate.engine.ranks import Ranks
from ssl_methods.method import Method, StepOutput


class DdpEngine:
    """Train with gradients averaged by DistributedDataParallel."""

    sharded = False

    def __init__(self, config: RunConfig, method: Method, ranks: Ranks) -> None:
        self.method = method
        self.optimizer = build_optimizer(config.optim, method, global_batch=config.train.global_batch)
        # Buffers are not broadcast: methods that need equal statistics compute them over the ranks.
        self._model = DistributedDataParallel(method, broadcast_buffers=False)
        self._autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""
        with self._autocast:
            output: StepOutput = self._model(views, labels)
        return output

    def update(self, output: StepOutput) -> None:
        """Average the gradients over the ranks and take one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state on the CPU."""
        return unsharded_state(self.optimizer, self.method)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned."""
        load_unsharded_state(self.optimizer, self.method, state)
