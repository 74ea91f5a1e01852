import shutil
import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrate.data.index import load_manifest, write_manifest
from orchestrate.data.pack import pack
from orchestrate.data.reader import Reader
from orchestrate.data.shards import write_shard
from orchestrate.data.stream import Batch, EvalStream, TrainStream
from orchestrate.errors import DataError
from ssl_methods.views import recipe
from tests.datasets import draw_shapes

GLOBAL_BATCH = 12
VIEWS = recipe("simclr", 16)


def stream(url: str, *, rank: int = 0, world_size: int = 1, workers: int = 0, start_step: int = 0) -> TrainStream:
    return TrainStream(
        url, recipe=VIEWS, seed=3, global_batch=GLOBAL_BATCH, rank=rank, world_size=world_size, workers=workers,
        start_step=start_step, with_labels=True,
    )  # fmt: skip


def batches(url: str, num_steps: int, **options: int) -> list[Batch]:
    with closing(stream(url, **options)) as opened:
        return list(islice(opened, num_steps))


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.sample_ids, expected.sample_ids)
    assert found.fingerprint == expected.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(found.views, expected.views, strict=True))
    assert found.labels is not None
    assert expected.labels is not None
    assert torch.equal(found.labels, expected.labels)


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        np.concatenate([part.sample_ids for part in parts]),
        [torch.cat(same) for same in zip(*(part.views for part in parts), strict=True)],
        torch.cat([part.labels for part in parts]),
        parts[0].fingerprint,
    )


NUM_STEPS = 20  # two epochs and a half


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset: str) -> list[Batch]:
    return batches(tiny_dataset, NUM_STEPS)


def test_batch_is_bytes_in_device_layout(uninterrupted: list[Batch]) -> None:
    batch = uninterrupted[0]
    assert [view.shape for view in batch.views] == [(12, 16, 16, 3)] * 2
    assert [view.dtype for view in batch.views] == [torch.uint8] * 2
    assert batch.labels.dtype == torch.int64
    assert batch.sample_ids.dtype == np.int64
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (3, 1), (4, 2), (12, 0)])
def test_ranks_and_workers_change_no_pixel(
    tiny_dataset: str, uninterrupted: list[Batch], world_size: int, workers: int
) -> None:
    num_steps = 9  # the ninth batch straddles the epochs
    ranks = [
        batches(tiny_dataset, num_steps, rank=r, world_size=world_size, workers=workers) for r in range(world_size)
    ]
    for step in range(num_steps):
        assert len({rank[step].fingerprint for rank in ranks}) == 1
        assert_same(joined([rank[step] for rank in ranks]), uninterrupted[step])


def test_restart_at_every_step_goes_on_as_if_never_stopped(tiny_dataset: str, uninterrupted: list[Batch]) -> None:
    for step in range(NUM_STEPS):
        (found,) = batches(tiny_dataset, 1, start_step=step, workers=step % 3)
        assert_same(found, uninterrupted[step])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_resume_of_a_resume_on_other_ranks_equals_one_run(
    tiny_dataset: str, uninterrupted: list[Batch], data: st.DataObject
) -> None:
    step = 0
    while step < NUM_STEPS:
        num_steps = min(data.draw(st.integers(1, 8), label="steps"), NUM_STEPS - step)
        world_size = data.draw(st.sampled_from([1, 2, 3, 4, 6]), label="ranks")
        workers = data.draw(st.integers(0, 2), label="workers")
        ranks = [
            batches(tiny_dataset, num_steps, rank=rank, world_size=world_size, start_step=step, workers=workers)
            for rank in range(world_size)
        ]
        for offset in range(num_steps):
            assert_same(joined([rank[offset] for rank in ranks]), uninterrupted[step + offset])
        step += num_steps


def test_every_epoch_shows_each_sample_once_and_augments_anew(uninterrupted: list[Batch]) -> None:
    ids = np.concatenate([batch.sample_ids for batch in uninterrupted])
    first = np.concatenate([batch.sample_ids for batch in uninterrupted[:8]])
    assert len(set(first)) == 96  # the 97th sample opens the ninth batch
    assert np.bincount(ids, minlength=97).min() >= 2
    pixels: dict[int, set[bytes]] = {}
    for batch in uninterrupted:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            pixels.setdefault(sample, set()).add(batch.views[0][row].numpy().tobytes())
    assert all(len(seen) >= 2 for seen in pixels.values())


def test_labels_are_those_of_the_samples(tiny_dataset: str, uninterrupted: list[Batch]) -> None:
    labels = np.concatenate([labels for _, _, labels in EvalStream(tiny_dataset, size=28, batch_size=50)])
    for batch in uninterrupted:
        np.testing.assert_array_equal(batch.labels, labels[batch.sample_ids])


def test_labels_come_only_when_asked_for(tiny_dataset: str) -> None:
    opened = TrainStream(tiny_dataset, recipe=VIEWS, seed=0, global_batch=4, rank=0, world_size=1, workers=0)
    assert next(opened).labels is None


def test_unlabelled_data_streams_but_gives_no_labels(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "images", 5, num_classes=1)
    pack(str(tmp_path / "images/disc"), str(tmp_path / "packed"), workers=1)
    url = str(tmp_path / "packed")
    assert (
        len(next(TrainStream(url, recipe=VIEWS, seed=0, global_batch=8, rank=0, world_size=1, workers=0)).sample_ids)
        == 8
    )
    assert next(iter(EvalStream(url, size=16, batch_size=5))).labels is None
    with pytest.raises(DataError, match="has no labels, and the method needs them"):
        stream(url)


def test_closed_stream_ends_and_leaves_no_thread(tiny_dataset: str) -> None:
    before = set(threading.enumerate())
    opened = stream(tiny_dataset, workers=2)
    next(opened)
    assert {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before} == {"loader"}
    opened.close()
    opened.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(opened)


def test_ranks_that_do_not_divide_the_batch_are_refused(tiny_dataset: str) -> None:
    with pytest.raises(ValueError, match="batch of 12 cannot be cut into 5 equal parts; nearest rank counts: 4 and 6"):
        stream(tiny_dataset, world_size=5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 100])  # 100 ranks, 97 samples: some have nothing to do
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_once_over_ranks(tiny_dataset: str, world_size: int, workers: int) -> None:
    streams = [
        EvalStream(tiny_dataset, size=16, batch_size=10, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    found = [list(each) for each in streams]
    assert [len(each) for each in streams] == [len(each) for each in found]
    ids = [batch.sample_ids for rank in found for batch in rank]
    np.testing.assert_array_equal(np.concatenate(ids), np.arange(97))
    counts = [sum(len(batch.sample_ids) for batch in rank) for rank in found]
    assert max(counts) - min(counts) <= 1
    assert {batch.images.shape[1:] for rank in found for batch in rank} == {(16, 16, 3)}


def test_evaluation_can_be_repeated(tiny_dataset: str) -> None:
    opened = EvalStream(tiny_dataset, size=28, batch_size=97)
    (first,), (second,) = list(opened), list(opened)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_evaluation_images_are_the_packed_pixels(tiny_dataset: str) -> None:
    (batch,) = EvalStream(tiny_dataset, size=28, batch_size=97)
    reader = Reader(tiny_dataset)
    for sample_id in range(97):
        np.testing.assert_array_equal(batch.images[sample_id], np.asarray(reader.read(sample_id).image))


@pytest.fixture
def damaged(tiny_dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_and_named(damaged: Path) -> None:
    key = Reader(str(damaged)).read(23).key
    lengths = np.fromfile(damaged / "train-000002.tar.idx", "<u4")[::2]
    flip(damaged / "train-000002.tar", int(lengths[:4].sum()) - 600)  # in the fourth sample of the third shard
    with pytest.raises(DataError, match=rf"train-000002.tar: sample 3 \(id 23\), key '{key}': CRC32 is \w+, the index"):
        Reader(str(damaged)).read(23)
    for workers in (0, 2):
        with pytest.raises(DataError, match="CRC32"):
            batches(str(damaged), 9, workers=workers)
    with pytest.raises(DataError, match="CRC32"):
        list(EvalStream(str(damaged), size=16, batch_size=10))
    assert Reader(str(damaged)).read(22).label is not None


def test_every_flipped_bit_of_a_sample_is_found(damaged: Path) -> None:
    shard = damaged / "train-000000.tar"
    length = int(np.fromfile(damaged / "train-000000.tar.idx", "<u4")[0])
    whole = shard.read_bytes()
    for place in range(0, length, 37):
        flip(shard, place)
        with pytest.raises(DataError, match="CRC32"):
            Reader(str(damaged)).read(0)
        shard.write_bytes(whole)


def test_shard_cut_or_removed_while_running_is_named(damaged: Path) -> None:
    reader = Reader(str(damaged))
    reader.read(5)
    with (damaged / "train-000000.tar").open("r+b") as shard:
        shard.truncate(2_000)
    with pytest.raises(DataError, match=r"train-000000.tar: sample 5 .*ends within it"):
        reader.read(5)
    (damaged / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar: sample 5 .*cannot be read: No such file"):
        reader.read(5)
    with pytest.raises(DataError, match=r"train-000000\.tar: missing"):
        Reader(str(damaged))


def test_index_of_other_samples_is_refused(damaged: Path) -> None:
    shutil.copy(damaged / "train-000001.tar.idx", damaged / "train-000000.tar.idx")
    with pytest.raises(DataError, match=r"train-000000.tar"):
        [Reader(str(damaged)).read(sample) for sample in range(10)]


def test_shards_of_one_sample_and_of_none_are_read(tiny_dataset: str, damaged: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_dataset)
    empty = write_shard(damaged / "empty-000000.tar", [])
    shards = (empty, manifest.shards[0], empty, empty, manifest.shards[9], empty)
    write_manifest(damaged, replace(manifest, shards=shards))
    reader, original = Reader(str(damaged)), Reader(tiny_dataset)
    assert reader.num_samples == 17
    assert [reader.read(n).key for n in range(17)] == [original.read(n).key for n in [*range(10), *range(90, 97)]]
    draw_shapes(tmp_path / "few", 3)
    pack(str(tmp_path / "few"), str(tmp_path / "ones"), samples_per_shard=1, workers=1)
    assert len({Reader(str(tmp_path / "ones")).read(n).key for n in range(3)}) == 3
