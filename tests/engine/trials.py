"""Small configs and engines for the tests of this folder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.config.run import RunConfig, parse_run
from orchestrate.engine.base import Engine, build_engine
from orchestrate.engine.methods import build_method
from orchestrate.engine.ranks import Ranks

GLOBAL_BATCH = 16
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.5, "weight_decay": 1e-4},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.05},
    "lars": {"name": "lars", "lr": 3.2, "bias_lr": 0.08, "weight_decay": 1e-6},
}


def run_config(optimizer: str = "adamw", *, precision: str = "fp32", **system: Any) -> RunConfig:
    config, problems = parse_run(
        {
            "data": {"train": "unused", "val": "unused", "train_digest": "t", "val_digest": "v"},
            "method": {"name": "barlow_twins", "embed_dim": 16},
            "backbone": {"name": "tiny_resnet"},
            "views": {"name": "small_grey", "size": 28},
            "optim": OPTIMIZERS[optimizer],
            "train": {"global_batch": GLOBAL_BATCH, "budget": "10step", "precision": precision},
            "system": system,
        }
    )
    assert config is not None, problems
    return config


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def engine_of(config: RunConfig) -> Engine:
    return build_engine(config, build_method(config), this_rank())


def views_of(step: int) -> list[Tensor]:
    """This rank's rows of the step's global batch: two random views."""
    generator = torch.Generator().manual_seed(step)
    rows = GLOBAL_BATCH // dist.get_world_size()
    begin = dist.get_rank() * rows
    return [torch.randn(GLOBAL_BATCH, 3, 28, 28, generator=generator)[begin : begin + rows] for _ in range(2)]


def take_steps(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        output = engine.forward(views_of(step), None)
        engine.update(output)
        losses.append(float(output.loss.detach()))
    return losses


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.method.state_dict().items()}
