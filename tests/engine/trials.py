"""Small configs and engines for the tests of this folder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.config.run import RunConfig, parse_run
from orchestrate.engine.base import Engine, build_engine
from orchestrate.engine.layout import OptimizerState
from orchestrate.engine.methods import build_method
from orchestrate.engine.optim import set_rates
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.schedule import Schedules
from orchestrate.engine.snapshot import flatten, unflatten
from ssl_methods.method import Progress

GLOBAL_BATCH = 16
TOTAL_STEPS = 20
SIDE = 16
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.5, "weight_decay": 1e-4},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.05},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 1e-4},
    "lars": {"name": "lars", "lr": 3.2, "bias_lr": 0.08, "weight_decay": 1e-6},
    "lars_triplet": {"name": "lars", "lr": 3.2, "bias_lr": 0.08, "weight_decay": 1e-6, "variant": "triplet"},
}
METHODS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"embed_dim": 16},
    "simclr": {"embed_dim": 16, "hidden_dim": 32},
    "moco": {"embed_dim": 16, "hidden_dim": 32, "queue_size": 64, "momentum": 0.9},
    "dino": {"embed_dim": 16, "hidden_dim": 32, "output_dim": 64, "momentum": 0.9},
}


def run_config(
    optimizer: str = "adamw",
    *,
    method: str = "barlow_twins",
    precision: str = "fp32",
    optim: dict[str, Any] | None = None,
    **system: Any,
) -> RunConfig:
    """A config of a few steps; `optim` adds to the named optimizer."""
    config, problems = parse_run(
        {
            "data": {"train": "unused", "val": "unused", "train_digest": "t", "val_digest": "v"},
            "method": {"name": method, **METHODS[method]},
            "backbone": {"name": "tiny_resnet"},
            "views": {"name": "small_grey", "size": SIDE},
            "optim": OPTIMIZERS[optimizer] | (optim or {}),
            "train": {"global_batch": GLOBAL_BATCH, "budget": f"{TOTAL_STEPS}step", "precision": precision},
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
    return [torch.randn(GLOBAL_BATCH, 3, SIDE, SIDE, generator=generator)[begin : begin + rows] for _ in range(2)]


def progress_of(done: int) -> Progress:
    return Progress(done, TOTAL_STEPS, 10.0)


def take_steps(engine: Engine, first: int, last: int, *, schedules: Schedules | None = None) -> list[float]:
    """Train from step `first` to `last`, counted from 1, at peak rates unless schedules are given."""
    return [loss for loss, _ in logged_steps(engine, first, last, schedules=schedules)]


def logged_steps(
    engine: Engine, first: int, last: int, *, schedules: Schedules | None = None
) -> list[tuple[float, dict[str, float]]]:
    """Train as `take_steps` does; return each step's loss and what the update logged."""
    done = []
    for step in range(first, last + 1):
        engine.method.before_step(progress_of(step - 1))
        if schedules is not None:
            if schedules.stages.forgets(step - 1):
                engine.forget_optimizer_state()
            rates = {"lr_factor": schedules.lr_factor(step - 1), "weight_decay": schedules.weight_decay(step - 1)}
            set_rates(engine.optimizer, **rates, frozen=schedules.frozen(step - 1))
        output = engine.forward(views_of(step), None)
        facts = engine.update(output)
        engine.method.after_step(progress_of(step))
        done.append((float(output.loss.detach()), facts))
    return done


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Copy the parameters and buffers of a method, whole."""
    with engine.whole():
        return {name: value.detach().clone() for name, value in engine.method.state_dict().items()}


def state_of(engine: Engine) -> OptimizerState:
    """Copy the whole optimizer state to every rank."""
    state = this_rank().tensors_from_main(flatten(engine.optimizer_state()))
    return unflatten({name: value.clone() for name, value in state.items()})
