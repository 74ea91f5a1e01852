import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.pack import pack
from orchestrate.data.reader import Reader
from orchestrate.data.sample_source import Loading
from orchestrate.data.stream import Batch, TrainStream
from orchestrate.errors import ConfigError, DataError
from tests.data.streams import VIEWS, assert_same, batches, byte_of_sample, flip, joined, stream
from tests.datasets import draw_shapes

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
    opened = TrainStream(tiny_dataset, recipe=VIEWS, seed=0, global_batch=4, rank=0, world_size=1)
    assert next(opened).labels is None


def test_unlabelled_data_streams_but_gives_no_labels(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "images", 5, num_classes=1)
    pack(str(tmp_path / "images/disc"), str(tmp_path / "packed"), workers=1)
    url = str(tmp_path / "packed")
    assert len(next(TrainStream(url, recipe=VIEWS, seed=0, global_batch=8, rank=0, world_size=1)).sample_ids) == 8
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
        EvalStream(
            tiny_dataset, size=16, batch_size=10, rank=rank, world_size=world_size, loading=Loading(workers=workers)
        )
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
        np.testing.assert_array_equal(
            batch.images[sample_id], reader.decode(reader.place(sample_id), reader.read(sample_id))
        )


def soften(pixels: np.ndarray, *, draw: Callable[[int], list[float]]) -> np.ndarray:
    """A user's transform: scales all levels by a random number of the sample's own."""
    return (pixels * draw(1)[0]).astype(np.uint8)


def test_processes_make_the_same_batches_as_threads(tiny_dataset: str, uninterrupted: list[Batch]) -> None:
    found = batches(tiny_dataset, 9, loading=Loading(workers=2, in_processes=True))
    for one, expected in zip(found, uninterrupted[:9], strict=True):
        assert_same(one, expected)


def test_a_transform_of_the_user_runs_on_each_image_alike_in_threads_and_processes(
    tiny_dataset: str, uninterrupted: list[Batch]
) -> None:
    transform = f"{__name__}:soften"
    alone = batches(tiny_dataset, 9, transform=transform)
    in_processes = batches(tiny_dataset, 9, transform=transform, loading=Loading(workers=2, in_processes=True))
    resumed = batches(tiny_dataset, 4, transform=transform, start_step=5)
    for step, batch in enumerate(alone):
        assert_same(in_processes[step], batch)
        assert not torch.equal(batch.views[0], uninterrupted[step].views[0])
    for one, expected in zip(resumed, alone[5:], strict=True):
        assert_same(one, expected)


def test_a_transform_that_cannot_be_imported_is_named(tiny_dataset: str) -> None:
    with pytest.raises(
        ConfigError, match=r"views.transform: tests.nowhere:soften: No module .*importable on every node"
    ):
        batches(tiny_dataset, 1, transform="tests.nowhere:soften")


def test_processes_report_damage_like_threads(tiny_dataset: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    flip(copy / "train-000002.tar", byte_of_sample(copy, "train-000002.tar", 3))
    expected = batches(str(copy), 9)
    found = batches(str(copy), 9, loading=Loading(workers=2, in_processes=True))
    for one, each in zip(found, expected, strict=True):
        assert_same(one, each)
        assert {damage.sample_id for damage in one.damaged} == {damage.sample_id for damage in each.damaged}


@pytest.mark.parametrize("pixels", ["fast", "reference", "device"])
def test_every_way_to_make_pixels_is_the_same_on_ranks_and_after_a_resume(tiny_dataset: str, pixels: str) -> None:
    whole = batches(tiny_dataset, 6, pixels=pixels)
    assert bool(whole[0].parameters) == (pixels == "device")
    resumed = [batches(tiny_dataset, 2, pixels=pixels, start_step=4, rank=rank, world_size=2) for rank in range(2)]
    for offset in range(2):
        assert_same(joined([rank[offset] for rank in resumed]), whole[4 + offset])
        together = zip(*(rank[offset].parameters for rank in resumed), strict=True)
        for parts, expected in zip(together, whole[4 + offset].parameters, strict=True):
            assert torch.equal(torch.cat(parts), expected)
