"""SIGKILL before each operation on the file system that a save makes, one after the other."""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrate.checkpoint_files import find_damage, list_checkpoints
from orchestrate.engine.base import Engine
from tests.engine.stores import TRIAL, names_in, position, saved_twice, store_of

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # Python tells of these before it does them


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process has none of torch's other threads, and would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def killed_at_each_change(work: Callable[[], None], prepare: Callable[[], None]) -> Iterator[int]:
    """Do some work in a forked process that is killed at its first change, then at its second, until it is done."""
    for number in count(1):
        prepare()
        process = os.fork()
        if process == 0:
            _work_and_leave(work, number)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number


def _work_and_leave(work: Callable[[], None], number: int) -> None:
    """Never return into the test that was forked."""
    code = 1
    try:
        _die_at_change(number)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _die_at_change(number: int) -> None:
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_killed_save_leaves_whole_checkpoints_and_the_next_one_cleans_up(tmp_path: Path, engine: Engine) -> None:
    saved_twice(tmp_path / "before", engine)
    folder = tmp_path / "checkpoints"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder)

    found = []
    for _ in killed_at_each_change(lambda: store_of(folder).save(engine, position(3)), prepare):
        assert not any(find_damage(path) for path in list_checkpoints(folder))
        newest = store_of(folder).load_newest(engine, TRIAL)
        assert newest in (position(2), position(3))
        found.append(newest)
        store_of(folder).save(engine, position(newest.step + 1))
        kept = [f"step-{step:08d}" for step in (newest.step, newest.step + 1)]
        assert names_in(folder) == ["latest.json", *kept]
    # It was killed at many moments, before and after the checkpoint got its name.
    assert found == sorted(found, key=lambda each: each.step)
    assert found.count(position(2)) > 8
    assert found.count(position(3)) > 3


def test_killed_first_save_leaves_nothing_or_all_of_it(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "checkpoints"
    found = [
        store_of(folder).load_newest(engine, TRIAL)
        for _ in killed_at_each_change(
            lambda: store_of(folder).save(engine, position(1)), lambda: shutil.rmtree(folder, ignore_errors=True)
        )
    ]
    assert set(found[:8]) == {None}
    assert found[-1] == position(1)
