"""Fetching ahead changes no pixel, whatever memory and cache there are; it fetches long ranges, within its bounds."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.index import load_manifest
from orchestrate.data.source import Loading
from orchestrate.data.stream import Batch
from orchestrate.errors import DataError
from tests.data.streams import assert_same, batches, byte_of_sample, flip, joined, stream

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


def test_memory_holds_no_more_than_it_may(remote: str) -> None:
    for memory_bytes in (ROOMY, 150_000):
        with closing(stream(remote, loading=Loading(workers=2, memory_bytes=memory_bytes))) as opened:
            list(islice(opened, STEPS))
            facts = opened.source.facts()
        assert 0 < facts["peak_bytes"] <= memory_bytes
        assert (facts["single_reads"] > 0) == (memory_bytes < ROOMY)


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
        assert [damage.sample_id for batch in found for damage in batch.damaged] == [23]
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
