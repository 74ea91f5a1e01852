"""A small training with its checkpoints, for the tests of them. One rank; ranks meet in test_checkpoint_ranks.py."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import CheckpointStore, Position
from tests.engine.trials import engine_of, run_config, take_steps, this_rank

TRIAL = "f" * 16


def small_engine() -> Engine:
    return engine_of(run_config("adamw", engine="ddp"))


def position(step: int, trial: str = TRIAL) -> Position:
    return Position(step, step * 16, trial, {"seed": 0}, {"total_steps": 10})


def store_of(folder: Path, said: list[str] | None = None, **options: Any) -> CheckpointStore:
    """A store whose saves return when they are on the disk, unless it is asked for another."""
    chosen: dict[str, Any] = {"keep": 2, "asynchronous": False, "say": [].append if said is None else said.append}
    return CheckpointStore(folder, this_rank(), **chosen | options)


def saved_twice(folder: Path, engine: Engine, **options: Any) -> CheckpointStore:
    """Train and save two steps."""
    store = store_of(folder, **options)
    for step in (1, 2):
        take_steps(engine, step, step)
        store.save(engine, position(step))
    return store


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file pass 100 kB, as on a disk that fills up in the middle of the weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
