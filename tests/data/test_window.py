"""Fetching ahead changes no pixel, whatever memory and cache there are; it fetches long ranges, within its bounds."""

import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrate.data import remote_store, sidecars, window
from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.fetch import Fetcher
from orchestrate.data.index import load_manifest
from orchestrate.data.order import Order
from orchestrate.data.reader import Reader
from orchestrate.data.readplan import Read
from orchestrate.data.run_loader import RunLoader
from orchestrate.data.sample_source import Loading, Source
from orchestrate.data.stream import Batch
from orchestrate.errors import DataError
from tests.data.streams import (
    GLOBAL_BATCH,
    Prefetch,
    assert_same,
    batches,
    byte_of_sample,
    flip,
    joined,
    stream,
    write_samples,
)

STEPS = 20  # two epochs and a half
ROOMY, TIGHT = 1 << 30, 40_000  # bytes; all 97 samples take about 400 kB


@pytest.fixture(scope="module")
def expected(tiny_dataset: str) -> list[Batch]:
    return batches(tiny_dataset, STEPS)


@pytest.fixture
def remote(tiny_dataset: str, tmp_path: Path) -> Iterator[str]:
    """The dataset in fsspec's store in memory: remote for all that we know, and countable."""
    store = fsspec.filesystem("memory")
    folder = f"/{tmp_path.name}/train"
    store.put(tiny_dataset, folder, recursive=True)
    yield f"memory://{folder}"
    store.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[str]:
    """An empty folder of the same store."""
    yield f"memory:///{tmp_path.name}/more"
    store = fsspec.filesystem("memory")
    if store.exists(f"/{tmp_path.name}/more"):
        store.rm(f"/{tmp_path.name}/more", recursive=True)


@pytest.fixture
def long_remote(tmp_path: Path, in_memory: str) -> str:
    return write_samples(tmp_path, in_memory, [500] * 800, per_shard=50)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("memory_bytes", [ROOMY, TIGHT, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_remote_samples_are_the_local_ones(
    remote: str, expected: list[Batch], tmp_path: Path, workers: int, memory_bytes: int, cached: bool
) -> None:
    cache = tmp_path / "cache" if cached else None
    loading = Loading(workers=workers, memory_bytes=memory_bytes, cache=cache, cache_bytes=ROOMY)
    for found, each in zip(batches(remote, STEPS, loading=loading), expected, strict=True):
        assert_same(found, each)


@pytest.mark.parametrize(("world_size", "start_step"), [(2, 0), (3, 7), (4, 8), (12, 13)])
def test_ranks_that_fetch_ahead_share_the_batch(
    remote: str, expected: list[Batch], tmp_path: Path, world_size: int, start_step: int
) -> None:
    loading = Loading(workers=1, cache=tmp_path / "cache", cache_bytes=ROOMY, memory_bytes=TIGHT)  # one cache for all
    place = {"world_size": world_size, "start_step": start_step, "loading": loading}
    ranks = [batches(remote, 4, rank=rank, **place) for rank in range(world_size)]
    for offset in range(4):
        assert_same(joined([rank[offset] for rank in ranks]), expected[start_step + offset])


def test_files_that_are_read_ahead_give_the_same(tiny_dataset: str, expected: list[Batch]) -> None:
    for found, each in zip(batches(tiny_dataset, STEPS, loading=Loading(ahead="always")), expected, strict=True):
        assert_same(found, each)


def test_an_epoch_is_fetched_in_chunks_and_once(remote: str) -> None:
    with closing(stream(remote, loading=Loading(workers=1))) as opened:
        list(islice(opened, 8))
        facts = opened.source.facts()
    total = sum(shard.bytes for shard in load_manifest(remote).shards)
    assert facts["single_reads"] == 0
    # 97 samples are 4 chunks of 32, which straddle shards of 10; the next epoch is fetched ahead too.
    assert facts["requests"] < 97
    assert facts["bytes"] <= 3 * total


def test_a_second_epoch_comes_from_the_cache(remote: str, tmp_path: Path) -> None:
    loading = Loading(workers=1, cache=tmp_path / "cache", cache_bytes=ROOMY)
    first = batches(remote, 12, loading=loading)  # touches all samples
    with closing(stream(remote, loading=loading, start_step=0)) as opened:
        for found, each in zip(islice(opened, 12), first, strict=True):
            assert_same(found, each)
        assert opened.source.facts()["bytes"] == 0


@pytest.mark.parametrize("memory_bytes", [ROOMY, 300_000, 150_000])
def test_memory_holds_no_more_than_it_may(remote: str, memory_bytes: int) -> None:
    with closing(Prefetch(remote, memory_bytes=memory_bytes)) as prefetch:
        held = [prefetch.step() for _ in range(STEPS)]
        facts = prefetch.loader.facts()
        assert max(held) <= prefetch.window.peak_bytes <= memory_bytes
    assert max(held) > memory_bytes / 4 or memory_bytes == ROOMY  # the bound is made use of
    assert (facts["single_reads"] > 0) == (memory_bytes < ROOMY)


@pytest.mark.parametrize("chunks", [0.9, 1.5, 5])
def test_what_was_read_early_is_forgotten(long_remote: str, chunks: float) -> None:
    """Also where the memory is smaller than one chunk of 32 samples, which can never be fetched ahead."""
    chunk_bytes = Reader(long_remote).num_bytes(range(32))
    with closing(Prefetch(long_remote, memory_bytes=int(chunks * chunk_bytes), lanes=1)) as prefetch:
        early = []
        for _ in range(100):
            prefetch.step()
            early.append(prefetch.window.early_samples)
        assert max(early) < 2 * 512  # of a block of 16 chunks, while the walk waits
        assert chunks < 1 or prefetch.window.peak_bytes > 0


def test_a_chunk_larger_than_the_memory_does_not_stop_those_after_it(tmp_path: Path, in_memory: str) -> None:
    sizes = [200] * 200 + [100_000] * 32 + [200] * 232
    remote = write_samples(tmp_path, in_memory, sizes, per_shard=32)
    with closing(Prefetch(remote, memory_bytes=1_000_000, lanes=1)) as prefetch:
        for _ in range(232):
            prefetch.step()
        facts = prefetch.loader.facts()
    assert facts["single_reads"] < 800  # of 2,784: two chunks of 15 hold all that is large


def test_more_indexes_than_memory_keeps_are_read_once_for_each_read(
    tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecars, "_KEPT_SAMPLES", 20)
    remote = write_samples(tmp_path, in_memory, [100] * 300, per_shard=2)
    with closing(Prefetch(remote, memory_bytes=ROOMY)) as prefetch:
        for _ in range(50):
            prefetch.step()
        requests = prefetch.loader.reader.counts.snapshot()["requests"]
    # Two epochs are used and one or two more fetched, each in 10 reads of 17 shards; and some are asked for ahead in
    # vain. To these come 150 shards that are looked at once.
    assert requests < 4 * 10 * 17 + 4 * 10 + 150 + 30


@pytest.mark.parametrize("room", [0.5, 0.1])
def test_a_small_cache_makes_nothing_come_twice(long_remote: str, tmp_path: Path, room: float) -> None:
    total = sum(shard.bytes for shard in load_manifest(long_remote).shards)
    loading = {"cache": tmp_path / "cache", "cache_bytes": int(room * total), "memory_bytes": total // 20}
    with closing(Prefetch(long_remote, **loading)) as prefetch:
        for _ in range(800 // GLOBAL_BATCH):
            prefetch.step()
        facts = prefetch.loader.facts()
    # An epoch, and what the memory and the cache may hold of the next one.
    assert facts["bytes"] <= (1 + room + 0.05 + 0.05) * total
    assert facts["single_reads"] > 0


def test_singles_of_a_batch_are_asked_for_at_once(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come only when as many requests as a batch has samples are open."""
    barrier = threading.Barrier(GLOBAL_BATCH)
    read_range = remote_store.read_range

    def together(url: str, *place: Any) -> bytes:
        if url.endswith(".tar"):
            barrier.wait(30.0)
        return read_range(url, *place)

    monkeypatch.setattr(remote_store, "read_range", together)
    reader = Reader(remote)
    loader = RunLoader(reader, Fetcher(max_concurrency=64))
    loader.fetcher._pace.limit = 64
    with closing(Prefetch(remote, memory_bytes=1, loader=loader, batches_ahead=0)) as prefetch:
        prefetch.step(workers=1)
    assert loader.single_reads == GLOBAL_BATCH


def test_many_who_wait_for_the_plan_cost_nothing(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = threading.Event()
    plans = window.plan_reads

    def late(*args: Any, **place: Any) -> Iterator[list[Read]]:
        planned.wait(30.0)
        yield from plans(*args, **place)

    monkeypatch.setattr(window, "plan_reads", late)
    with closing(Prefetch(remote, memory_bytes=ROOMY)) as prefetch:
        threading.Timer(1.0, planned.set).start()
        begun = time.process_time()
        prefetch.step(workers=8)
        assert time.process_time() - begun < 0.5  # of the second; waiters that wake each other take all of it


def test_too_little_room_is_said(remote: str, tmp_path: Path) -> None:
    reader, order = Reader(remote), Order(97, 0, global_batch=12)
    place = {"rank": 0, "world_size": 1, "start_step": 0}
    wanted = r"0\.000\d+ GB of samples should be fetched ahead by each rank, there is room for "
    for loading, advice in (
        (Loading(memory_bytes=ROOMY), "^$"),
        (Loading(memory_bytes=TIGHT, cache=tmp_path / "cache", cache_bytes=ROOMY), "^$"),
        (Loading(memory_bytes=TIGHT), rf"{wanted}4e-05 GB: .*; raise system.data_memory_gb .* or set system.cache"),
        (
            Loading(memory_bytes=TIGHT, cache=tmp_path / "small", cache_bytes=10_000),
            rf"{wanted}5e-05 GB: .* or raise system.cache_gb",
        ),
    ):
        with closing(Source(reader.reopened(), order, loading, **place)) as source:
            assert re.search(advice, source.advice)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_three_epochs_show_each_sample_three_times(tmp_path: Path, in_memory: str, data: st.DataObject) -> None:
    """Whatever the shards, ranks, memory, cache and known damage."""
    sizes = data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=300), label="sizes")
    per_shard = data.draw(st.sampled_from([1, 7, 40]), label="samples of a shard")
    world_size = data.draw(st.integers(1, 3), label="ranks")
    batch = world_size * data.draw(st.sampled_from([1, 4, 30]), label="batch of a rank")
    options: dict[str, Any] = {
        "memory_bytes": data.draw(st.sampled_from([1, 20_000, 100_000, ROOMY]), label="memory"),
        "cache": data.draw(st.sampled_from([None, tmp_path / uuid4().hex]), label="cache"),
        "cache_bytes": data.draw(st.sampled_from([2_000, 100_000, ROOMY]), label="cache bytes"),
    }
    skipped = data.draw(st.sets(st.integers(0, len(sizes) - 1)), label="skipped")
    remote = write_samples(tmp_path / uuid4().hex, f"{in_memory}/{uuid4().hex}", sizes, per_shard=per_shard)
    ranks = [
        Prefetch(remote, rank=rank, world_size=world_size, batch=batch, skipped=skipped, **options)
        for rank in range(world_size)
    ]
    seen: list[list[int]] = []
    with ExitStack() as opened:
        for rank in ranks:
            opened.callback(rank.close)
        for step in range(-(-3 * len(sizes) // batch)):
            for rank in ranks:
                rank.step()
            seen.append([sample_id for rank in ranks for sample_id in rank.seen])
            wanted = ranks[0].order.batch(step)[0].tolist()
            assert seen[-1] == [sample_id for sample_id in wanted if sample_id not in skipped]
    whole = [sample_id for each in seen for sample_id in each]
    past = ranks[0].order.sample_ids(np.arange(3 * len(sizes), len(seen) * batch)).tolist()
    counts = Counter(whole)
    counts.subtract(sample_id for sample_id in past if sample_id not in skipped)
    assert all(counts[sample_id] == 3 * (sample_id not in skipped) for sample_id in range(len(sizes)))


def test_a_damaged_copy_in_the_cache_is_fetched_again(remote: str, expected: list[Batch], tmp_path: Path) -> None:
    loading = Loading(cache=tmp_path / "cache", cache_bytes=ROOMY)
    batches(remote, STEPS, loading=loading)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 3_000]
    spoiled = [path for path in files if not path.name.startswith("index")]
    assert spoiled
    for path in spoiled:
        flip(path, 1_500)
    found = batches(remote, STEPS, loading=loading)
    assert not any(batch.damaged for batch in found)
    for one, each in zip(found, expected, strict=True):
        assert_same(one, each)


def test_what_is_damaged_in_the_store_is_replaced_as_in_a_local_copy(
    remote: str, tiny_dataset: str, tmp_path: Path
) -> None:
    local = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    flip(local / "train-000002.tar", byte_of_sample(local, "train-000002.tar", 3))
    fsspec.filesystem("memory").put(str(local / "train-000002.tar"), remote.removeprefix("memory:/"))
    spoiled = batches(str(local), STEPS)
    for cache in (None, tmp_path / "cache"):
        found = batches(remote, STEPS, loading=Loading(workers=1, cache=cache, cache_bytes=ROOMY))
        assert [damage.sample_id for batch in found for damage in batch.damaged] == [23]  # told once
        for one, each in zip(found, spoiled, strict=True):
            assert_same(one, each)


def test_missing_or_changed_shards_stop_the_stream_before_their_first_sample(remote: str) -> None:
    store, folder = fsspec.filesystem("memory"), remote.removeprefix("memory:/")
    with store.open(f"{folder}/train-000004.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000004.tar: [\d,]+ bytes, the manifest says .* changed after"):
        batches(remote, 8)
    store.rm(f"{folder}/train-000004.tar")
    with pytest.raises(DataError, match=r"train-000004.tar: missing"):
        batches(remote, 8, loading=Loading(workers=2))


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_reads_remote_data_in_long_ranges(
    remote: str, tiny_dataset: str, tmp_path: Path, cached: bool
) -> None:
    loading = Loading(workers=2, cache=tmp_path / "cache" if cached else None, cache_bytes=ROOMY)
    for _ in range(2):
        found = list(EvalStream(remote, size=28, batch_size=40, loading=loading))
        (whole,) = EvalStream(tiny_dataset, size=28, batch_size=97)
        assert [len(batch.sample_ids) for batch in found] == [40, 40, 17]
        assert all((batch.images == whole.images[batch.sample_ids]).all() for batch in found)
