"""What a save leaves on the disk, and what a resume makes of it after any damage."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import pytest
import torch

from orchestrate.checkpoint_files import FORMAT, find_damage, sealed
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import Position
from orchestrate.errors import CheckpointError, DivergedError
from tests.engine.stores import (
    TRIAL,
    flip_a_bit,
    full_disk,
    names_in,
    position,
    saved_twice,
    small_engine,
    store_of,
    truncate,
)
from tests.engine.trials import engine_of, run_config, take_steps, weights_of

FILES = ["model.safetensors", "optimizer.safetensors", "ranks.safetensors"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumed_engine_takes_the_same_next_step(tmp_path: Path, engine: Engine, asynchronous: bool) -> None:
    saved_twice(tmp_path, engine, asynchronous=asynchronous).finish()
    other = small_engine()
    assert store_of(tmp_path).load_newest(other, TRIAL) == position(2)
    assert take_steps(other, 3, 4) == take_steps(engine, 3, 4)
    assert all(torch.equal(weights_of(other)[name], value) for name, value in weights_of(engine).items())


def test_random_numbers_go_on_where_they_were(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    expected = torch.rand(3)
    store_of(tmp_path).load_newest(engine, TRIAL)
    assert torch.equal(torch.rand(3), expected)


def test_loss_scale_goes_on_where_it_was(tmp_path: Path, one_rank: None) -> None:
    config = run_config("adamw", engine="ddp", precision="fp16")
    engine, other = engine_of(config), engine_of(config)
    engine.loss_scale.update(overflowed=True)
    engine.loss_scale.update(overflowed=False)
    store_of(tmp_path).save(engine, position(1))
    store_of(tmp_path).load_newest(other, TRIAL)
    assert other.loss_scale.state() == engine.loss_scale.state() != engine_of(config).loss_scale.state()


def test_equal_states_give_equal_bytes(tmp_path: Path, engine: Engine) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        store_of(folder).save(engine, position(1))
    for name in FILES:
        first, second = (tmp_path / folder / "step-00000001" / name for folder in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_manifest_says_what_was_trained_and_how(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    manifest = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    assert set(manifest.pop("files")) == set(FILES)
    del manifest["seal"]
    assert manifest == {
        "format": FORMAT,
        "step": 2,
        "samples_seen": 32,
        "fingerprint": TRIAL,
        "order": {"seed": 0},
        "schedules": {"total_steps": 10},
        "world_size": 1,
        "milestone": False,
        "engine": {"name": "DdpEngine", "sharded": False, "loss_scale": {}},
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, engine: Engine, name: str, damage: Callable[[Path], None]
) -> None:
    saved_twice(tmp_path, engine)
    damage(tmp_path / "step-00000002" / name)
    said: list[str] = []
    assert store_of(tmp_path, said).load_newest(engine, TRIAL) == position(1)
    assert "step-00000002" in said[0]
    assert name in said[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: '{"format": 2}',
        lambda text: text.replace('"step": 2', '"step": 3'),
        lambda text: text.replace('"samples_seen": 32', '"samples_seen": 33'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"milestone": false', '"milestone": true'),
    ],
)
def test_damaged_manifest_is_damage_too(tmp_path: Path, engine: Engine, damage: Callable[[str], str]) -> None:
    saved_twice(tmp_path, engine)
    manifest = tmp_path / "step-00000002" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(damage(before))
    assert manifest.read_text() != before
    assert store_of(tmp_path).load_newest(engine, TRIAL) == position(1)


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    for step in (1, 2):
        truncate(tmp_path / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        store_of(tmp_path).load_newest(engine, TRIAL)


def test_checkpoint_of_another_trial_is_refused(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    with pytest.raises(CheckpointError, match="belongs to the trial ffff"):
        store_of(tmp_path).load_newest(engine, "0" * 16)


def test_checkpoint_of_the_trial_that_is_continued_is_taken(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    child = "0" * 16
    store = store_of(tmp_path)
    assert store.load_newest(engine, child, parent=TRIAL) == position(2)
    store.save(engine, position(3, child))
    assert store.load_newest(engine, child, parent=TRIAL) == position(3, child)


def test_trial_that_continues_another_never_begins_afresh(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint of the trial {TRIAL}, which this one continues"):
        store_of(tmp_path).load_newest(engine, "0" * 16, parent=TRIAL)


def test_checkpoint_of_another_format_is_named_as_such(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "format": 1})))
    with pytest.raises(CheckpointError, match="step-00000002: is of checkpoint format 1, this version reads 2"):
        store_of(tmp_path).load_newest(engine, TRIAL)


def test_weights_of_another_network_are_refused(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path, engine)
    engine.method.register_buffer("extra", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"does not fit the method(.|\n)*extra"):
        store_of(tmp_path).load_newest(engine, TRIAL)


def test_empty_folder_is_a_fresh_start(tmp_path: Path, engine: Engine) -> None:
    assert store_of(tmp_path / "none").load_newest(engine, TRIAL) is None


def test_half_written_checkpoint_does_not_exist_for_a_reader(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    (tmp_path / ".tmp-step-00000003").mkdir()
    (tmp_path / ".tmp-step-00000003" / "model.safetensors").write_bytes(b"half")
    assert store.load_newest(engine, TRIAL) == position(2)
    store.save(engine, position(3))
    assert ".tmp-step-00000003" not in names_in(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{}", '{"checkpoint": "step-00000009"}'])
def test_whatever_latest_says_the_newest_whole_checkpoint_is_taken(
    tmp_path: Path, engine: Engine, text: str | None
) -> None:
    store = saved_twice(tmp_path, engine)
    latest = tmp_path / "latest.json"
    latest.unlink() if text is None else latest.write_text(text)
    assert store.load_newest(engine, TRIAL) == position(2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, engine: Engine) -> None:
    store = store_of(tmp_path)
    for step in range(1, 5):
        store.save(engine, position(step))
    assert names_in(tmp_path) == ["latest.json", "step-00000003", "step-00000004"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "step-00000004"}


def test_milestones_are_kept_for_ever_and_fill_no_place(tmp_path: Path, engine: Engine) -> None:
    store = store_of(tmp_path)
    for step in range(1, 7):
        store.save(engine, position(step), milestone=step in (2, 5))
    kept = [f"step-{step:08d}" for step in (2, 4, 5, 6)]
    assert names_in(tmp_path) == ["latest.json", *kept]


def test_damaged_checkpoint_is_replaced_when_its_step_is_made_again(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    truncate(tmp_path / "step-00000002" / "model.safetensors")
    store.save(engine, position(2))
    assert find_damage(tmp_path / "step-00000002") == ""


def test_full_disk_leaves_what_was_there(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine)
    before = names_in(tmp_path)
    with full_disk(), pytest.raises(CheckpointError, match=r"cannot write a checkpoint: .*; free space and resume"):
        store.save(engine, position(3))
    assert names_in(tmp_path) == before
    assert store.load_newest(engine, TRIAL) == position(2)
    store.save(engine, position(3))  # there is space again
    assert store.load_newest(engine, TRIAL) == position(3)


READ_ONLY = """
import os, sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from orchestrate.errors import CheckpointError
from tests.engine.stores import TRIAL, position, small_engine, store_of
engine, store = small_engine(), store_of(Path(sys.argv[1]))
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    store.save(engine, position(3))
except CheckpointError as error:
    print(error)
assert store.load_newest(engine, TRIAL) == position(2)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike `tmp_path`."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_read_only_folder_is_an_error_and_can_still_be_read(open_folder: Path, engine: Engine) -> None:
    saved_twice(open_folder, engine)
    open_folder.chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY, str(open_folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    open_folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert "cannot write a checkpoint: [Errno 13] Permission denied" in result.stdout
    assert result.stdout.endswith("; mend that and resume\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_state_that_is_not_finite_is_never_saved(tmp_path: Path, engine: Engine, value: float) -> None:
    store = saved_twice(tmp_path, engine)
    before = names_in(tmp_path)
    name, parameter = next(iter(engine.method.named_parameters()))
    parameter.detach().view(-1)[0] = value
    with pytest.raises(DivergedError, match=f"step 3: {name} is not finite; not saved"):
        store.save(engine, position(3))
    assert names_in(tmp_path) == before
    assert store.load_newest(engine, TRIAL) == position(2)
    store.save(engine, position(3))


def test_background_write_is_of_the_state_at_the_save(tmp_path: Path, engine: Engine) -> None:
    store, other, released = store_of(tmp_path, asynchronous=True), small_engine(), Event()
    take_steps(engine, 1, 2)
    saved = weights_of(engine)
    store._executor.submit(released.wait, 60)  # the one writer is busy
    store.save(engine, position(2))
    losses = take_steps(engine, 3, 4)
    released.set()
    store.finish()
    store.load_newest(other, TRIAL)
    assert all(torch.equal(weights_of(other)[name], value) for name, value in saved.items())
    assert take_steps(other, 3, 4) == losses  # so the state of the optimizer is that of the save too


def test_full_disk_in_the_background_is_told_and_ends_the_next_save(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine, asynchronous=True)
    store.finish()
    before = names_in(tmp_path)
    with full_disk():
        store.save(engine, position(3))
        store.close()  # the write has ended, in failure
        assert "cannot write a checkpoint" in store.failure
    with pytest.raises(CheckpointError, match="cannot write a checkpoint"):
        store.save(engine, position(4))
    assert names_in(tmp_path) == before
    assert store.failure == ""  # it was told
    store.save(engine, position(4))
    store.finish()
    assert store.load_newest(engine, TRIAL) == position(4)


def test_failed_background_write_is_told_at_the_end(tmp_path: Path, engine: Engine) -> None:
    store = saved_twice(tmp_path, engine, asynchronous=True)
    store.finish()
    with full_disk():
        store.save(engine, position(3))
        with pytest.raises(CheckpointError, match="cannot write a checkpoint"):
            store.finish()
    store.finish()


def test_fault_of_this_program_is_not_told_as_one_of_the_disk(
    tmp_path: Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    unwritable = Position(1, 16, TRIAL, {"seed": 0}, {"total_steps": object()})
    with pytest.raises(CheckpointError, match=r"a fault of this program, see the traceback$"):
        store_of(tmp_path).save(engine, unwritable)
    assert "TypeError" in capfd.readouterr().err
