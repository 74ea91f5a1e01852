"""DeepSpeed behind the Engine interface; the only file that imports it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.config.run import RunConfig
from orchestrate.engine.base import OptimizerState, load_unsharded_state, unsharded_state
from orchestrate.engine.optim import build_optimizer
from orchestrate.engine.ranks import Ranks
from ssl_methods.method import Method, StepOutput


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Write DeepSpeed's own config, with every default that would change the numbers stated."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 unless told otherwise
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.system.zero_stage, "overlap_comm": False},
        # Parameters and twins stay fp32: plain "bf16" would round an average with momentum 0.996 away.
        # No module is "lower precision safe": that would sum their gradients over ranks in bf16 under ZeRO.
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """Train with DeepSpeed, ZeRO stage 0 or 1."""

    def __init__(self, config: RunConfig, method: Method, ranks: Ranks) -> None:
        deepspeed = _import_deepspeed(ranks)
        self.method = method
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=method,
            optimizer=build_optimizer(config.optim, method, global_batch=config.train.global_batch),
            config=deepspeed_config(config, ranks.world_size),
            dist_init_required=False,
        )
        self.sharded = config.system.zero_stage > 0

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""
        output: StepOutput = self._engine(views, labels)
        return output

    def update(self, output: StepOutput) -> None:
        """Average the gradients over the ranks and take one optimizer step."""
        self._engine.backward(output.loss)
        self._engine.step()

    def optimizer_state(self) -> OptimizerState:
        """Return the whole optimizer state on the CPU; under ZeRO the ranks' parts are gathered."""
        return (
            _gathered_state(self.optimizer, self.method)
            if self.sharded
            else unsharded_state(self.optimizer, self.method)
        )

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take back what `optimizer_state` returned, at any stage and on any number of ranks."""
        if self.sharded:
            _scatter_state(self.optimizer, self.method, state)
        else:
            load_unsharded_state(self.optimizer, self.method, state)


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


# ZeRO keeps, for each parameter group, one flat fp32 vector of all its parameters, cut into equal parts, a part a rank.
# `round_robin_bit16_offsets` says where each parameter begins in the flat vector.


def _layout(zero: Any, group: int, module: Method) -> list[tuple[str, torch.nn.Parameter, int]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters, offsets = zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]
    return [(names[parameter], parameter, int(offset)) for parameter, offset in zip(parameters, offsets, strict=True)]


def _gathered_state(zero: Any, module: Method) -> OptimizerState:
    state: OptimizerState = {}
    for group, part in enumerate(zero.single_partition_of_fp32_groups):
        for key, value in zero.optimizer.state.get(part, {}).items():
            if not torch.is_tensor(value):
                continue
            flat = _all_parts(value) if value.shape == part.shape else None
            for name, parameter, offset in _layout(zero, group, module):
                whole = value if flat is None else flat[offset : offset + parameter.numel()].view(parameter.shape)
                state.setdefault(name, {})[key] = whole.detach().cpu().clone()
    return state


def _all_parts(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts)


def _scatter_state(zero: Any, module: Method, state: OptimizerState) -> None:
    zero.refresh_fp32_params()
    for group, part in enumerate(zero.single_partition_of_fp32_groups):
        layout = _layout(zero, group, module)
        begin = part.numel() * dist.get_rank()
        flats: dict[str, Tensor] = {}
        for name, parameter, offset in layout:
            for key, value in state.get(name, {}).items():
                if value.ndim == 0 and parameter.ndim != 0:
                    flats[key] = value.clone()
                    continue
                flat = flats.setdefault(key, torch.zeros(part.numel() * dist.get_world_size(), dtype=part.dtype))
                flat[offset : offset + parameter.numel()] = value.reshape(-1)
        zero.optimizer.state[part] = {
            key: flat if flat.ndim == 0 else flat[begin : begin + part.numel()].to(part.device, copy=True)
            for key, flat in flats.items()
        }
