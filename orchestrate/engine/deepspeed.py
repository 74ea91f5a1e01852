"""DeepSpeed behind the Engine interface; the only file that imports it."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from orchestrate.config.construction import own_parameter_problem
from orchestrate.config.run import RunConfig
from orchestrate.engine.ddp import averaging
from orchestrate.engine.gradients import GradientRules
from orchestrate.engine.layout import Layout, OptimizerState, WholeLayout, trained_names
from orchestrate.engine.optim import build_optimizer
from orchestrate.engine.precision import Forward, LossScale
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.zero import PartitionedLayout
from orchestrate.engine.zero3 import ScatteredLayout
from orchestrate.errors import ConfigError
from ssl_methods.method import Method, StepOutput


def deepspeed_config(config: RunConfig, world_size: int, num_trained: int) -> dict[str, Any]:
    """Write DeepSpeed's own config, with every default that would change the numbers or cost something stated.

    Precision, loss scale and clipping are ours (`Forward`, `GradientRules`), so that they are the same in all engines.

    Args:
        config: of the trial.
        world_size: number of ranks.
        num_trained: numbers in all trained parameters.
    """
    stage = config.system.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        # A bucket is allocated whole, whatever the size of the model: here 200 MB at most instead of 2 GB.
        "reduce_bucket_size": min(num_trained, 5 * 10**7),
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small parameters would stay whole, a second way to be
    elif stage > 0:
        zero["compute_grad_norm"] = False  # of whole gradients at every step, which nobody reads
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 unless told otherwise
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        # Plain "bf16" would make parameters and twins half precision and round an average with momentum 0.996 away.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """Train with DeepSpeed, ZeRO stages 0 to 3."""

    def __init__(self, config: RunConfig, method: Method, ranks: Ranks) -> None:
        if config.system.zero_stage == 3 and (problem := own_parameter_problem(method)):
            raise ConfigError(f"system.zero_stage: 3: {problem}")
        deepspeed = _import_deepspeed(ranks)
        self.method = method
        self.sharded = config.system.zero_stage > 0
        self.loss_scale = LossScale(dynamic=config.train.precision == "fp16")
        optimizer = build_optimizer(
            config.optim, method, global_batch=config.train.global_batch, last_layer=method.last_layer()
        )
        names = trained_names(optimizer, method)
        num_trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
        model: nn.Module = Forward(method, config.train.precision, ranks.device)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model if self.sharded else averaging(model),
            optimizer=optimizer,
            config=deepspeed_config(config, ranks.world_size, num_trained),
            dist_init_required=False,
        )
        if not self.sharded:
            # DeepSpeed would copy and average the gradients after the backward pass; torch does so during it, in place.
            self._engine.enable_backward_allreduce = False
        self._rules = GradientRules(
            config.optim,
            self.optimizer,
            loss_scale=self.loss_scale,
            names=names,
            device=ranks.device,
            sharded=self.sharded,
        )
        self._layout = self._build_layout(config.system.zero_stage, deepspeed.zero.GatheredParameters)

    def _build_layout(self, stage: int, gather: Any) -> Layout:
        if stage == 3:
            return ScatteredLayout(self.optimizer, self.method, gather)
        return (PartitionedLayout if stage else WholeLayout)(self.optimizer, self.method)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""
        output: StepOutput = self._engine(views, labels)
        return output

    def update(self, output: StepOutput) -> dict[str, float]:
        """Average the gradients over the ranks and take one optimizer step."""
        self._engine.backward(self.loss_scale.scaled(output.loss))
        facts = {} if self._rules.idle else self._rules.apply(self._layout.slices())
        if facts.get("skipped"):
            self._layout.discard_gradients()
        else:
            self._engine.step()
        return facts

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state; under ZeRO 1 to 3 rank 0 gathers it and the others return nothing."""
        return self._layout.optimizer_state()

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned, at any stage and on any number of ranks."""
        self._layout.load_optimizer_state(state)

    def forget_optimizer_state(self) -> None:
        """Let the optimizer begin afresh."""
        self._layout.forget_optimizer_state()

    def whole(self) -> AbstractContextManager[None]:
        """Hold whole parameters inside."""
        return self._layout.whole()


def _import_deepspeed(ranks: Ranks) -> Any:
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # DeepSpeed asserts that it is there
    import deepspeed
    import deepspeed.ops

    # On CPUs DeepSpeed compiles a shared-memory all-reduce for inference when it starts (half a minute). Training never
    # calls it, so it is declared unavailable.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed
