"""Damaged samples: named, replaced by a neighbour on every rank alike, never trained on."""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.index import Manifest, load_manifest, write_manifest
from orchestrate.data.reader import DamagedSampleError, Reader
from orchestrate.data.sample_source import Loading
from orchestrate.data.shards import pack_sample, unpack_sample, write_shard
from orchestrate.errors import DataError
from tests.data.streams import assert_same, batches, byte_of_sample, flip, joined, stream

BAD = 23  # the fourth sample of the third shard
SHARD = "train-000002.tar"
Spoil = Callable[[Path], None]


@pytest.fixture
def copy(tiny_dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def flip_one_bit(folder: Path) -> None:
    flip(folder / SHARD, byte_of_sample(folder, SHARD, 3))


def cut_image(folder: Path) -> None:
    _replace(folder, lambda key, members: pack_sample(key, {**members, "png": members["png"][:200]}))


def drop_image(folder: Path) -> None:
    _replace(folder, lambda key, members: pack_sample(key, {"cls": members["cls"]}))


def drop_label(folder: Path) -> None:
    _replace(folder, lambda key, members: pack_sample(key, {"png": members["png"]}))


def name_no_class(folder: Path) -> None:
    _replace(folder, lambda key, members: pack_sample(key, {**members, "cls": b"17"}))


def _replace(folder: Path, change: Callable[[str, dict[str, bytes]], bytes]) -> None:
    """Write a sample anew, index and all: what somebody else's writer did wrong has a right checksum."""
    manifest = load_manifest(str(folder))
    lengths = np.fromfile(folder / f"{SHARD}.idx", "<u4")[::2].tolist()
    data, samples = (folder / SHARD).read_bytes(), []
    for length in lengths:
        samples.append(data[:length])
        data = data[length:]
    samples[3] = change(*unpack_sample(samples[3]))
    shards = list(manifest.shards)
    shards[2] = write_shard(folder / SHARD, samples)
    write_manifest(folder, Manifest(tuple(shards), manifest.classes, manifest.split, manifest.info))


SPOILED: dict[Spoil, str] = {
    flip_one_bit: "CRC32 is",
    cut_image: "cannot be decoded",
    drop_image: "0 images among its members",
    drop_label: "no label, though",
    name_no_class: "label 17, classes are 0 to 3",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_neighbour_stands_in_for_a_damaged_sample_on_any_number_of_ranks(
    spoil: Spoil, copy: Path, tiny_dataset: str
) -> None:
    key = Reader(str(copy)).read(BAD).key
    whole = batches(tiny_dataset, 9)
    spoil(copy)
    alone = batches(str(copy), 9)
    (damage,) = [damage for batch in alone[:8] for damage in batch.damaged]
    assert (damage.sample_id, damage.index, damage.shard) == (BAD, 3, str(copy / SHARD))
    assert damage.key == key
    assert SPOILED[spoil] in damage.reason
    for found, expected in zip(alone[:8], whole[:8], strict=True):
        np.testing.assert_array_equal(found.sample_ids, expected.sample_ids)  # the order is as planned
        assert found.fingerprint == expected.fingerprint
        rows = found.sample_ids != BAD
        assert torch.equal(found.views[0][rows], expected.views[0][rows])
        assert found.substituted == int((~rows).sum())
    for options in ({"workers": 2}, {"quarantined": [BAD]}):
        for found, expected in zip(batches(str(copy), 9, **options), alone, strict=True):
            assert_same(found, expected)
    ranks = [batches(str(copy), 9, rank=rank, world_size=3) for rank in range(3)]
    for step, expected in enumerate(alone):
        assert_same(joined([rank[step] for rank in ranks]), expected)


def test_a_substitute_shows_other_pixels_and_its_own_label(copy: Path, tiny_dataset: str) -> None:
    flip_one_bit(copy)
    labels = np.concatenate([batch.labels for batch in EvalStream(tiny_dataset, size=28, batch_size=50)])
    for batch in batches(str(copy), 9):
        for row in np.flatnonzero(batch.sample_ids == BAD):
            images = torch.cat([batch.views[0][:row], batch.views[0][row + 1 :]])
            assert all(not torch.equal(batch.views[0][row], image) for image in images)
            assert batch.labels is not None
            assert batch.labels[row] in labels


def test_substitutes_that_are_damaged_too_are_passed_over(copy: Path) -> None:
    for index in range(10):
        flip(copy / SHARD, byte_of_sample(copy, SHARD, index))
    found = batches(str(copy), 8)
    assert {damage.sample_id for batch in found for damage in batch.damaged} == set(range(20, 30))
    assert sum(batch.substituted for batch in found) == sum(
        int(((batch.sample_ids >= 20) & (batch.sample_ids < 30)).sum()) for batch in found
    )


def test_where_nothing_is_whole_the_stream_ends_with_an_error(copy: Path) -> None:
    for shard in load_manifest(str(copy)).shards:
        for index in range(shard.samples):
            flip(copy / shard.name, byte_of_sample(copy, shard.name, index))
    with pytest.raises(DataError, match="and 256 neighbours are damaged"):
        batches(str(copy), 1)


def test_damage_is_told_by_the_first_batch_that_it_touches_whichever_met_it_first(copy: Path) -> None:
    """Batch 0 finds a known sample: a later one was quicker, as with several workers."""
    for index in range(10):
        flip(copy / SHARD, byte_of_sample(copy, SHARD, index))
    expected = [[damage.sample_id for damage in batch.damaged] for batch in batches(str(copy), 8)]
    with closing(stream(str(copy))) as late:
        started = [late._start(step) for step in reversed(range(8))]  # batches are filled when they are started
        found = [sorted(damage.sample_id for damage in pending.finish().damaged) for pending in reversed(started)]
    assert found == [sorted(each) for each in expected]
    assert sum(map(len, found)) == 10


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_remote_run_resumed_on_other_ranks_with_its_ledger_goes_on_as_if_never_stopped(
    copy: Path, world_size: int, request: pytest.FixtureRequest
) -> None:
    for shard, index in ((SHARD, 3), ("train-000007.tar", 0)):
        flip(copy / shard, byte_of_sample(copy, shard, index))
    store, folder = fsspec.filesystem("memory"), f"/{copy.parent.name}"
    store.put(str(copy), folder, recursive=True)
    request.addfinalizer(lambda: store.rm(folder, recursive=True))
    remote = f"memory://{folder}"
    whole = batches(remote, 20)
    ledger = {damage.sample_id for batch in whole[:9] for damage in batch.damaged}
    assert ledger == {BAD, 70}
    options = {"start_step": 9, "world_size": world_size, "quarantined": ledger, "loading": Loading(workers=1)}
    ranks = [batches(remote, 11, rank=rank, **options) for rank in range(world_size)]
    for step, expected in enumerate(whole[9:]):
        assert_same(joined([rank[step] for rank in ranks]), expected)
    assert not [damage for rank in ranks for batch in rank for damage in batch.damaged]


def test_evaluation_stops_at_a_damaged_sample(copy: Path) -> None:
    flip_one_bit(copy)
    with pytest.raises(DamagedSampleError, match=rf"{SHARD}: sample 3 \(id 23\), key '.*': CRC32 is \w+, the index"):
        list(EvalStream(str(copy), size=16, batch_size=10))


def test_every_flipped_bit_of_a_sample_is_found(copy: Path) -> None:
    shard = copy / "train-000000.tar"
    length = int(np.fromfile(copy / "train-000000.tar.idx", "<u4")[0])
    whole = shard.read_bytes()
    for place in range(0, length, 37):
        flip(shard, place)
        with pytest.raises(DamagedSampleError, match="CRC32"):
            Reader(str(copy)).read(0)
        shard.write_bytes(whole)


def test_a_shard_that_became_shorter_stops_the_stream(copy: Path) -> None:
    reader = Reader(str(copy))
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:3000])
    with pytest.raises(DataError, match="3,000 bytes, the manifest says"):
        reader.check_unchanged(2)
    with pytest.raises(DataError, match=SHARD):
        batches(str(copy), 8)
