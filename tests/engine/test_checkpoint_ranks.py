"""Checkpoints over ranks. Starting ranks costs more than these trainings do, so each start tries several cases."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import CheckpointStore
from orchestrate.errors import CheckpointError, DivergedError, OrchestrateError
from tests.distributed import run_on_ranks
from tests.engine.stores import TRIAL, full_disk, position, store_of
from tests.engine.trials import engine_of, run_config, take_steps, this_rank, weights_of

DDP: dict[str, Any] = {"engine": "ddp"}
ZERO_1, ZERO_2, ZERO_3 = ({"engine": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3))


def _store(folder: Path, said: list[str] | None = None, **options: Any) -> CheckpointStore:
    """A store whose folder only rank 0 has, as on the disk of a node."""
    return store_of(folder if this_rank().is_main else Path("/no/such/folder"), said, **options)


def _largest_difference(first: Engine, second: Engine) -> float:
    with first.whole(), second.whole():
        ours, theirs = weights_of(first), weights_of(second)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def _continue_after_a_save(folder: Path, system: dict[str, Any], asynchronous: bool) -> dict[str, Any]:
    """Save after two steps, take two more; load into another engine and take the same two."""
    engine, other = (engine_of(run_config("adamw", **system)) for _ in range(2))
    store = _store(folder, asynchronous=asynchronous)
    take_steps(engine, 1, 2)
    torch.manual_seed(100 + this_rank().rank)
    store.save(engine, position(2))
    random, losses = torch.rand(3).tolist(), take_steps(engine, 3, 4)
    store.finish()
    found = _store(folder).load_newest(other, TRIAL)
    return {
        "position": found == position(2),
        "random": torch.rand(3).tolist() == random,
        "losses": take_steps(other, 3, 4) == losses,
        "weights": _largest_difference(engine, other),
    }


def _every_engine_continues(folder: Path) -> list[dict[str, Any]]:
    cases = [(DDP, False), (DDP, True), (ZERO_1, True), (ZERO_2, False), (ZERO_3, True)]
    return [_continue_after_a_save(folder / str(index), *case) for index, case in enumerate(cases)]


def test_every_rank_goes_on_exactly_although_only_rank_0_sees_the_folder(tmp_path: Path) -> None:
    exact = {"position": True, "random": True, "losses": True, "weights": 0.0}
    assert run_on_ranks(2, _every_engine_continues, tmp_path) == [[exact] * 5] * 2


def _error_of(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except OrchestrateError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _fail_in_every_way(folder: Path) -> dict[str, str]:
    engine = engine_of(run_config("adamw", **DDP))
    errors = {}
    with full_disk():
        errors["full disk"] = _error_of(_store(folder).save, engine, position(1))
        store = _store(folder, asynchronous=True)
        store.save(engine, position(1))
        errors["full disk in the background"] = _error_of(store.finish)
    _store(folder).save(engine, position(1))
    errors["another trial"] = _error_of(_store(folder).load_newest, engine, "0" * 16)
    next(engine.method.parameters()).detach().fill_(float("nan"))
    errors["not finite"] = _error_of(_store(folder).save, engine, position(2))
    return errors


def test_what_fails_on_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _fail_in_every_way, tmp_path)
    assert first == second
    assert first["full disk"].startswith(CheckpointError.__name__)
    assert first["full disk in the background"] == first["full disk"]
    assert "belongs to the trial" in first["another trial"]
    assert first["not finite"].startswith(f"{DivergedError.__name__}: step 2: ")


def _save_both(folder: Path) -> dict[str, Tensor]:
    for method in ("barlow_twins", "moco"):
        engine = engine_of(run_config("adamw", method=method, **DDP))
        take_steps(engine, 1, 2)
        _store(folder / method).save(engine, position(2))
    return weights_of(engine)


def _load_both(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for method, options in {"barlow_twins": {}, "moco": {}, "elastic moco": {"elastic": True}}.items():
        name, said = method.split()[-1], list[str]()
        engine = engine_of(run_config("adamw", method=name, **DDP))
        facts[method] = _error_of(_store(folder / name, said, **options).load_newest, engine, TRIAL) or said
        facts[f"random of {method}"] = torch.rand(1).item()
    return facts | {"weights": weights_of(engine)}


def test_another_number_of_ranks_goes_on_unless_the_method_is_tied_to_it(tmp_path: Path) -> None:
    saved = run_on_ranks(2, _save_both, tmp_path)[0]
    first, second, *_ = run_on_ranks(4, _load_both, tmp_path)
    assert all(torch.equal(second["weights"][name], value) for name, value in saved.items())
    assert "saved by 2 ranks, resumed by 4: the global batches stay; sums round differently" in first["barlow_twins"][0]
    tie = "saved by 2 ranks, resumed by 4: batch norm sees one rank's part of the batch, which ties MoCo to the rank"
    assert tie in first["moco"]
    assert "start 2 ranks, or set system.elastic: true" in first["moco"]
    assert second["moco"] == first["moco"]
    assert "system.elastic lets that be" in first["elastic moco"][0]
    # Ranks begin new streams of random numbers, their own ones.
    assert first["random of barlow_twins"] != second["random of barlow_twins"]
    assert first["random of barlow_twins"] == first["random of elastic moco"]
