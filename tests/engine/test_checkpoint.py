"""What is on the disk after any damage or kill, and what a resume makes of it. One rank; ranks meet in tests/e2e."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import CheckpointStore, Position, find_damage
from orchestrate.engine.ranks import leave_ranks
from orchestrate.errors import CheckpointError
from tests.engine.trials import engine_of, run_config, take_steps, this_rank, weights_of


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave_ranks()


@pytest.fixture
def engine() -> Engine:
    return engine_of(run_config("adamw", engine="ddp"))


def position(step: int) -> Position:
    return Position(step, step * 16, "f" * 16, {"seed": 0})


def store_of(folder: Path, said: list[str], keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, this_rank(), keep=keep, say=said.append)


def saved_twice(folder: Path, engine: Engine) -> CheckpointStore:
    store = store_of(folder, [])
    for step in (1, 2):
        take_steps(engine, step, step)
        store.save(engine, position(step))
    return store


def test_resumed_engine_takes_the_same_next_step(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    other = engine_of(run_config("adamw", engine="ddp"))
    assert store_of(tmp_path, []).load_newest(other, "f" * 16) == position(2)
    assert take_steps(other, 3, 4) == take_steps(engine, 3, 4)
    assert all(torch.equal(weights_of(other)[name], value) for name, value in weights_of(engine).items())


def test_random_numbers_go_on_where_they_were(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    expected = torch.rand(3)
    store_of(tmp_path, []).load_newest(engine, "f" * 16)
    assert torch.equal(torch.rand(3), expected)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rank-0.safetensors"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, engine: Engine, name: str, damage: Callable[[Path], None]
) -> None:
    saved_twice(tmp_path, engine)
    damage(tmp_path / "step-00000002" / name)
    said: list[str] = []
    assert store_of(tmp_path, said).load_newest(engine, "f" * 16) == position(1)
    assert "step-00000002" in said[0]
    assert name in said[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: '{"format": 1}',
        lambda text: text.replace('"step": 2', '"step": 3'),
        lambda text: text.replace('"samples_seen": 32', '"samples_seen": 33'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
    ],
)
def test_damaged_manifest_is_damage_too(tmp_path: Path, engine: Engine, damage: Callable[[str], str]) -> None:
    saved_twice(tmp_path, engine)
    manifest = tmp_path / "step-00000002" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(damage(before))
    assert manifest.read_text() != before
    assert store_of(tmp_path, []).load_newest(engine, "f" * 16) == position(1)


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    for step in (1, 2):
        truncate(tmp_path / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        store_of(tmp_path, []).load_newest(engine, "f" * 16)


def test_checkpoint_of_another_trial_is_refused(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    with pytest.raises(CheckpointError, match="belongs to the trial ffff"):
        store_of(tmp_path, []).load_newest(engine, "0" * 16)


def test_empty_folder_is_a_fresh_start(tmp_path: Path, engine: Engine) -> None:
    assert store_of(tmp_path / "none", []).load_newest(engine, "f" * 16) is None


def test_half_written_checkpoint_does_not_exist_for_a_reader(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    (tmp_path / ".tmp-step-00000003").mkdir()
    (tmp_path / ".tmp-step-00000003" / "model.safetensors").write_bytes(b"half")
    assert store.load_newest(engine, "f" * 16) == position(2)


@pytest.mark.parametrize("text", ["", "{}", '{"checkpoint": "step-00000009"}'])
def test_whatever_latest_says_the_newest_whole_checkpoint_is_taken(tmp_path: Path, engine: Engine, text: str) -> None:
    store = saved_twice(tmp_path, engine)
    (tmp_path / "latest.json").write_text(text)
    assert store.load_newest(engine, "f" * 16) == position(2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, engine: Engine) -> None:
    store = store_of(tmp_path, [], keep=2)
    for step in range(1, 5):
        store.save(engine, position(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-00000003", "step-00000004"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "step-00000004"}


def test_damaged_checkpoint_is_replaced_when_its_step_is_made_again(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    truncate(tmp_path / "step-00000002" / "model.safetensors")
    store.save(engine, position(2))
    assert find_damage(tmp_path / "step-00000002") == ""


def test_failed_write_leaves_what_was_there(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may pass 100 kB, as on a disk that fills up in the middle of the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write a checkpoint: rank 0"):
            store.save(engine, position(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert store.load_newest(engine, "f" * 16) == position(2)
