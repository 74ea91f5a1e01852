"""Checkpoints kept at a URL as well: in memory, in another folder, and in a store that fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrate.checkpoint_files import find_damage, list_checkpoints, sealed
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint_mirror import Mirror
from orchestrate.errors import CheckpointError
from tests.engine.stores import TRIAL, flip_a_bit, names_in, position, saved_twice, small_engine, store_of
from tests.engine.trials import take_steps


class FailingStore(MemoryFileSystem):
    """A store whose next uploads fail, or which cannot be asked at all."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec keeps a store for each class
    pseudo_dirs = [""]  # noqa: RUF012
    uploads_to_fail = 0
    is_down = False
    uploaded: list[str] = []  # noqa: RUF012

    def put_file(self, source: str, target: str, **options: Any) -> None:
        if FailingStore.uploads_to_fail > 0:
            FailingStore.uploads_to_fail -= 1
            raise ConnectionError("the bucket is on fire")
        FailingStore.uploaded.append(target.rpartition("/")[2])
        super().put_file(source, target, **options)

    def ls(self, path: str, **options: Any) -> Any:
        if FailingStore.is_down:
            raise ConnectionError("no route to the bucket")
        return super().ls(path, **options)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty stores, and no pause between tries."""
    monkeypatch.setattr(Mirror, "delays_seconds", (0.0, 0.0))
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.uploads_to_fail, FailingStore.is_down = 0, False
    FailingStore.uploaded.clear()
    yield
    for each in (MemoryFileSystem, FailingStore):
        each.store.clear()
        each.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoints of a RunDir called `trial`."""
    return tmp_path / "trial" / "checkpoints"


@pytest.fixture(params=["memory://bucket/runs", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket" if request.param == "file" else str(request.param)


def names_at(url: str) -> list[str]:
    store, base = fsspec.core.url_to_fs(f"{url}/trial/checkpoints")
    return sorted(path.rpartition("/")[2] for path in store.ls(base, detail=False))


def file_at(url: str, name: str) -> tuple[Any, str]:
    store, base = fsspec.core.url_to_fs(f"{url}/trial/checkpoints/{name}")
    return store, base


def test_training_goes_on_from_the_url_where_the_folder_is_lost(folder: Path, url: str, engine: Engine) -> None:
    saved_twice(folder, engine, url=url).finish()
    shutil.rmtree(folder)
    other, said = small_engine(), list[str]()
    assert store_of(folder, said, url=url).load_newest(other, TRIAL) == position(2)
    assert take_steps(other, 3, 3) == take_steps(engine, 3, 3)
    assert said == [f"{url}/trial/checkpoints/step-00000002: downloaded"]
    assert names_in(folder) == ["step-00000002"]


def test_url_keeps_what_the_folder_keeps(folder: Path, url: str, engine: Engine) -> None:
    store = store_of(folder, url=url)
    for step in range(1, 7):
        store.save(engine, position(step), milestone=step in (2, 5))
    store.finish()
    kept = [f"step-{step:08d}" for step in (2, 4, 5, 6)]
    assert names_at(url) == kept
    assert names_in(folder) == ["latest.json", *kept]


def test_background_saves_reach_the_url_too(folder: Path, engine: Engine) -> None:
    url = "memory://bucket/runs"
    saved_twice(folder, engine, url=url, asynchronous=True).finish()
    assert names_at(url) == ["step-00000001", "step-00000002"]


def test_newer_checkpoint_at_the_url_wins_over_the_folder(folder: Path, url: str, engine: Engine) -> None:
    saved_twice(folder, engine, url=url).finish()
    shutil.rmtree(folder / "step-00000002")
    assert store_of(folder, url=url).load_newest(engine, TRIAL) == position(2)


def test_damaged_checkpoint_of_the_folder_is_replaced_from_the_url(folder: Path, url: str, engine: Engine) -> None:
    saved_twice(folder, engine, url=url).finish()
    flip_a_bit(folder / "step-00000002" / "model.safetensors")
    assert store_of(folder, url=url).load_newest(engine, TRIAL) == position(2)
    assert find_damage(folder / "step-00000002") == ""


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_half_or_damaged_checkpoint_at_the_url_is_skipped(
    folder: Path, url: str, engine: Engine, name: str, damage: str
) -> None:
    saved_twice(folder, engine, url=url).finish()
    shutil.rmtree(folder)
    store, path = file_at(url, f"step-00000002/{name}")
    data = bytearray(store.cat_file(path))
    data[len(data) // 2] ^= 1
    store.rm_file(path) if damage == "missing" else store.pipe_file(path, bytes(data))
    said: list[str] = []
    assert store_of(folder, said, url=url).load_newest(engine, TRIAL) == position(1)
    # Without a manifest it was never whole, so there is nothing to tell.
    assert ("step-00000002" in said[0]) == ((name, damage) != ("manifest.json", "missing"))
    assert names_in(folder) == ["step-00000001"]


def test_half_an_upload_and_nothing_else_is_a_fresh_start(folder: Path, url: str, engine: Engine) -> None:
    store = store_of(folder, url=url)
    store.save(engine, position(1))
    store.finish()
    shutil.rmtree(folder)
    bucket, path = file_at(url, "step-00000001/manifest.json")
    bucket.rm_file(path)
    assert store.load_newest(engine, TRIAL) is None


def test_half_an_upload_is_cleaned_away_by_a_later_one(folder: Path, url: str, engine: Engine) -> None:
    store = saved_twice(folder, engine, url=url)
    store.finish()
    bucket, path = file_at(url, "step-00000001/manifest.json")
    bucket.rm_file(path)
    shutil.rmtree(folder / "step-00000001")
    store.save(engine, position(3))
    store.finish()
    assert names_at(url) == ["step-00000002", "step-00000003"]


def test_url_that_does_not_exist_yet_is_a_fresh_start(folder: Path, url: str, engine: Engine) -> None:
    assert store_of(folder, url=url).load_newest(engine, TRIAL) is None


def test_manifest_goes_up_last(folder: Path, engine: Engine) -> None:
    store = store_of(folder, url="failing://bucket")
    store.save(engine, position(1))
    store.finish()
    assert FailingStore.uploaded[-1] == "manifest.json"
    assert len(FailingStore.uploaded) == 4


def test_upload_that_fails_is_tried_again(folder: Path, engine: Engine) -> None:
    said: list[str] = []
    FailingStore.uploads_to_fail = 2
    saved_twice(folder, engine, url="failing://bucket", say=said.append).finish()
    assert names_at("failing://bucket") == ["step-00000001", "step-00000002"]
    assert said == []


def test_bucket_that_fails_is_told_and_ends_no_training_before_its_end(folder: Path, engine: Engine) -> None:
    said: list[str] = []
    FailingStore.uploads_to_fail = 10**9
    store = saved_twice(folder, engine, url="failing://bucket", say=said.append)
    store.save(engine, position(3))
    store.finish(stopped=True)
    assert "could not be uploaded: ConnectionError: the bucket is on fire; training goes on" in said[0]
    assert store.failure == ""
    with pytest.raises(CheckpointError, match="the bucket is on fire; mend that and resume, nothing has to be trained"):
        store.finish()
    assert names_in(folder) == ["latest.json", "step-00000002", "step-00000003"]
    FailingStore.uploads_to_fail = 0
    store.finish()
    assert names_at("failing://bucket") == ["step-00000002", "step-00000003"]


def test_bucket_that_cannot_be_asked_ends_a_training_only_if_it_might_begin_afresh(
    folder: Path, engine: Engine
) -> None:
    said: list[str] = []
    saved_twice(folder, engine, url="failing://bucket").finish()
    FailingStore.is_down = True
    store = store_of(folder, said, url="failing://bucket")
    assert store.load_newest(engine, TRIAL) == position(2)
    assert "cannot be read: ConnectionError: no route to the bucket" in said[0]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="no route to the bucket"):
        store.load_newest(engine, TRIAL)


def test_unknown_kind_of_url_is_named(folder: Path, engine: Engine) -> None:
    with pytest.raises(CheckpointError, match="nosuch://bucket/trial/checkpoints: cannot be read"):
        store_of(folder, url="nosuch://bucket").load_newest(engine, TRIAL)


def test_file_outside_of_the_checkpoint_is_never_written(folder: Path, engine: Engine) -> None:
    url = "memory://bucket/runs"
    saved_twice(folder, engine, url=url).finish()
    shutil.rmtree(folder)
    store, path = file_at(url, "step-00000002/manifest.json")
    manifest = json.loads(store.cat_file(path))
    manifest["files"]["../../run.yaml"] = manifest["files"]["model.safetensors"]
    store.pipe_file(path, json.dumps(sealed(manifest)).encode())
    assert store_of(folder, url=url).load_newest(engine, TRIAL) == position(1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000001"]
