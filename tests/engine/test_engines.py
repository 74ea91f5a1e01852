"""DeepSpeed is the same training as plain DDP, and optimizer state travels between engines, stages and rank counts.

Starting ranks costs more than these trainings do, so each test starts them once and tries every case in them.
"""

from itertools import product
from typing import Any

import torch

from orchestrate.engine.base import OptimizerState
from tests.distributed import run_on_ranks
from tests.engine.trials import engine_of, run_config, take_steps, weights_of

Weights = dict[str, torch.Tensor]
System = dict[str, Any]

DDP: System = {"engine": "ddp"}
ZERO_0: System = {"engine": "deepspeed", "zero_stage": 0}
ZERO_1: System = {"engine": "deepspeed", "zero_stage": 1}


def _train(optimizer: str, system: System, steps: int) -> tuple[list[float], Weights]:
    engine = engine_of(run_config(optimizer, **system))
    return take_steps(engine, 1, steps), weights_of(engine)


def _largest_difference(first: Weights, second: Weights) -> float:
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


PARITY = [
    *[(optimizer, stage, "fp32") for optimizer in ("sgd", "adamw") for stage in (ZERO_0, ZERO_1)],
    ("lars", ZERO_0, "fp32"),
    *[("adamw", stage, "bf16") for stage in (ZERO_0, ZERO_1)],
]


def _compare_with_ddp() -> list[tuple[bool, float]]:
    facts = []
    for optimizer, system, precision in PARITY:
        losses, weights = _train(optimizer, system | {"precision": precision}, 10)
        ddp_losses, ddp_weights = _train(optimizer, DDP | {"precision": precision}, 10)
        facts.append((losses == ddp_losses, _largest_difference(weights, ddp_weights)))
    return facts


def test_deepspeed_trains_exactly_as_ddp() -> None:
    assert run_on_ranks(2, _compare_with_ddp)[0] == [(True, 0.0)] * len(PARITY)


def _save_after(steps: int, system: System) -> tuple[Weights, OptimizerState]:
    engine = engine_of(run_config("adamw", **system))
    take_steps(engine, 1, steps)
    return weights_of(engine), engine.optimizer_state()


def _go_on(system: System, saved: tuple[Weights, OptimizerState], first: int, last: int) -> Weights:
    engine = engine_of(run_config("adamw", **system))
    engine.method.load_state_dict(saved[0])
    engine.load_optimizer_state(saved[1])
    take_steps(engine, first, last)
    return weights_of(engine)


def _carry_state_between_engines() -> dict[str, float]:
    undisturbed = _train("adamw", DDP, 6)[1]
    return {
        f"{origin} to {to}": _largest_difference(_go_on(to, _save_after(3, origin), 4, 6), undisturbed)
        for origin, to in product((DDP, ZERO_0, ZERO_1), repeat=2)
    }


def test_state_saved_by_one_engine_continues_exactly_in_another() -> None:
    differences = run_on_ranks(2, _carry_state_between_engines)[0]
    assert differences == dict.fromkeys(differences, 0.0)


def _save_and_undisturbed() -> tuple[tuple[Weights, OptimizerState], Weights]:
    return _save_after(3, ZERO_1), _train("adamw", ZERO_1, 4)[1]


def test_zero_state_continues_on_another_number_of_ranks() -> None:
    saved, undisturbed = run_on_ranks(2, _save_and_undisturbed)[0]
    for world_size in (1, 4):
        continued = run_on_ranks(world_size, _go_on, ZERO_1, saved, 4, 4)[0]
        # One step: sums over ranks round differently (1e-7), which AdamW may turn into a part of its step of 0.6e-3.
        assert _largest_difference(continued, undisturbed) < 1e-4
