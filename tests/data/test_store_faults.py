"""Stores that answer wrong, late or never: nothing sound is called damaged, and whoever waits can be sent home."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.index import Manifest, load_manifest, write_manifest
from orchestrate.data.indexing import index
from orchestrate.data.reader import Reader
from orchestrate.data.sample_source import Loading
from orchestrate.data.stream import Batch
from orchestrate.errors import DataError, StorageError
from tests.data.fault_proxy import FaultProxy, Kind
from tests.data.object_store import BUCKET, ObjectStore, object_store
from tests.data.streams import assert_same, batches, flip, stream

__all__ = ["object_store"]  # a fixture

STEPS = 8  # an epoch
INDEX, SHARD = "train-000002.tar.idx", "train-000002.tar"
CACHE_BYTES = 1 << 26
PROMPT_SECONDS = 5.0  # a stalled request is given up after 20 s at the earliest


@pytest.fixture(scope="module")
def expected(tiny_dataset: str) -> list[Batch]:
    return batches(tiny_dataset, STEPS)


@pytest.fixture(scope="module")
def uploaded(object_store: ObjectStore, tiny_dataset: str) -> str:
    """The prefix of a copy in the store, its manifest of this version."""
    object_store.upload(tiny_dataset, "faults")
    return "faults"


@pytest.fixture
def proxy(object_store: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(object_store.endpoint, seed=1) as proxy:
        yield proxy


@pytest.fixture
def url(proxy: FaultProxy, uploaded: str) -> str:
    return f"{proxy.url}/{BUCKET}/{uploaded}"


@pytest.fixture
def old_url(proxy: FaultProxy, object_store: ObjectStore, tiny_dataset: str, tmp_path: Path) -> str:
    """The same data with a manifest that says nothing of the contents of indexes."""
    manifest = load_manifest(tiny_dataset)
    shards = tuple(replace(shard, sidecar_crc="") for shard in manifest.shards)
    object_store.upload(tiny_dataset, "old")
    write_manifest(tmp_path, Manifest(shards, manifest.classes, manifest.split, manifest.info))
    object_store.put("old/manifest.json", (tmp_path / "manifest.json").read_bytes())
    return f"{proxy.url}/{BUCKET}/old"


def assert_sound(found: list[Batch], expected: list[Batch]) -> None:
    assert not [damage for batch in found for damage in batch.damaged]
    for one, each in zip(found, expected, strict=True):
        assert_same(one, each)


@pytest.mark.parametrize("kind", ["wrong", "short", "half"])
@pytest.mark.parametrize("has_checksum", [True, False])
def test_an_index_that_comes_damaged_condemns_nothing_and_is_not_kept(
    url: str, old_url: str, proxy: FaultProxy, expected: list[Batch], tmp_path: Path, kind: Kind, has_checksum: bool
) -> None:
    loading = Loading(workers=1, cache=tmp_path / "cache", cache_bytes=CACHE_BYTES)
    proxy.add(kind, path=INDEX, times=1)
    for _ in range(2):
        assert_sound(batches(url if has_checksum else old_url, STEPS, loading=loading), expected)
    assert proxy.counts[f"fault {kind}"] == 1


def test_a_kept_index_that_is_damaged_is_fetched_again(
    url: str, proxy: FaultProxy, expected: list[Batch], tmp_path: Path
) -> None:
    loading = Loading(workers=1, cache=tmp_path / "cache", cache_bytes=CACHE_BYTES)
    batches(url, STEPS, loading=loading)
    for number, path in enumerate(sorted((tmp_path / "cache" / "sidecars").iterdir())):
        flip(path, number)
    assert_sound(batches(url, STEPS, loading=loading), expected)
    fetched = len([path for _, path, _ in proxy.requests if path.endswith(".idx")])
    assert_sound(batches(url, STEPS, loading=loading), expected)
    assert len([path for _, path, _ in proxy.requests if path.endswith(".idx")]) == fetched  # healed


def test_an_index_that_is_damaged_for_ever_is_named(url: str, proxy: FaultProxy) -> None:
    proxy.add("wrong", path=INDEX, times=-1)
    with pytest.raises(DataError, match=rf"{INDEX}: CRC32 is \w+, the manifest says \w+; run .*verify --repair"):
        Reader(url).read(20)


def test_bytes_that_are_often_wrong_are_read_until_they_are_right(
    url: str, proxy: FaultProxy, expected: list[Batch]
) -> None:
    proxy.add("wrong", path=".tar", times=-1, probability=0.2)
    with closing(stream(url, loading=Loading(workers=2, memory_bytes=40_000))) as opened:
        assert_sound([next(opened) for _ in range(STEPS)], expected)
        assert opened.source.reread > 0


def test_bytes_that_are_wrong_in_another_way_each_time_stop_the_run_to_be_resumed(url: str, proxy: FaultProxy) -> None:
    reader = Reader(url)
    place = reader.place(20)
    proxy.add("wrong", path=SHARD, times=-1)  # in the middle of each answer, which lies elsewhere at each try
    with pytest.raises(StorageError, match=r"train-000002.tar: sample 0 \(id 20\): other wrong bytes at each read"):
        reader.settle(place, b"")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 40_000])
def test_a_stream_closes_at_once_while_the_store_is_silent(
    url: str, proxy: FaultProxy, method: str, memory_bytes: int
) -> None:
    opened = stream(url, loading=Loading(workers=2, memory_bytes=memory_bytes))
    proxy.add("silent", path="train-00000", method=method, times=-1)
    taker, ended = _in_thread(lambda: next(opened))
    _wait_until(lambda: proxy.counts["fault silent"] > 0)
    _assert_prompt(opened.close)
    taker.join(PROMPT_SECONDS)
    # A taker that waits is told so; one that still asked for more, as on a busy machine, finds the stream at its end.
    assert [type(error).__name__ for error in ended] in (["CancelledError"], ["StopIteration"])


@pytest.mark.parametrize("workers", [0, 2])
def test_who_asks_a_stream_for_more_while_it_closes_is_told_so(
    url: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    opened = stream(url, loading=Loading(workers=workers))
    batch = opened.order.batch

    def close_first(step: int) -> object:
        opened.close()
        return batch(step)

    monkeypatch.setattr(opened.order, "batch", close_first)
    with pytest.raises(CancelledError):
        next(opened)
    with pytest.raises(StopIteration):
        next(opened)


def test_an_evaluation_ends_with_its_error_while_the_store_is_silent(
    url: str, proxy: FaultProxy, tiny_dataset: str
) -> None:
    proxy.add("silent", path="train-000001.tar", times=-1)
    proxy.add("404", path="train-000000.tar", method="HEAD", times=-1)
    evaluation = EvalStream(url, size=16, batch_size=10, loading=Loading(workers=2))

    def run() -> None:
        with pytest.raises(DataError, match=r"train-000000.tar: missing"):
            list(evaluation)

    _assert_prompt(run)


def test_a_closed_reader_leaves_its_twin_open(url: str) -> None:
    reader = Reader(url)
    twin = reader.reopened()
    reader.close()
    assert twin.read(3).key


def test_a_shard_of_another_version_stops_the_run_and_one_wrong_answer_does_not(
    object_store: ObjectStore,
    proxy: FaultProxy,
    tiny_dataset: str,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[Batch],
) -> None:
    for path in sorted(Path(tiny_dataset).glob("*.tar")):
        object_store.put(f"foreign/{path.name}", path.read_bytes())
    object_store.use(monkeypatch)
    foreign = f"s3://{BUCKET}/foreign"
    index(foreign, workers=1)
    assert all(shard.version for shard in load_manifest(foreign).shards)
    object_store.use(monkeypatch, proxy.url)
    proxy.add("etag", path=SHARD, method="HEAD", times=1)
    found = batches(foreign, STEPS, with_labels=False, loading=Loading(workers=1))
    assert proxy.counts["fault etag"] == 1
    assert all(torch.equal(one.views[0], each.views[0]) for one, each in zip(found, expected, strict=True))
    proxy.add("etag", path=SHARD, method="HEAD", times=-1)
    with pytest.raises(DataError, match=rf"{SHARD}: version \S*changed, the manifest says"):
        batches(foreign, STEPS, with_labels=False, loading=Loading(workers=1))


def _in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, errors


def _assert_prompt(call: Callable[[], object]) -> None:
    thread, errors = _in_thread(call)
    thread.join(PROMPT_SECONDS)
    assert not thread.is_alive()
    assert not errors


def _wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < give_up
        threading.Event().wait(0.01)
