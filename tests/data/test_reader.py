import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.data.index import load_manifest, write_manifest
from orchestrate.data.pack import pack
from orchestrate.data.reader import Reader
from orchestrate.data.shards import write_shard
from orchestrate.errors import DataError
from tests.datasets import draw_shapes


@pytest.fixture
def copy(tiny_dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def test_shard_cut_or_removed_while_running_is_named(copy: Path) -> None:
    reader = Reader(str(copy))
    reader.read(5)
    with (copy / "train-000000.tar").open("r+b") as shard:
        shard.truncate(2_000)
    with pytest.raises(DataError, match=r"train-000000.tar: 2,000 bytes, the manifest says"):
        reader.read(5)
    (copy / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar: missing"):
        reader.read(5)
    with pytest.raises(DataError, match=r"train-000000\.tar: missing"):
        Reader(str(copy))


def test_index_of_other_samples_is_refused(copy: Path) -> None:
    shutil.copy(copy / "train-000001.tar.idx", copy / "train-000000.tar.idx")
    with pytest.raises(DataError, match=r"train-000000.tar"):
        [Reader(str(copy)).read(sample) for sample in range(10)]


def test_shards_of_one_sample_and_of_none_are_read(tiny_dataset: str, copy: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_dataset)
    empty = write_shard(copy / "empty-000000.tar", [])
    shards = (empty, manifest.shards[0], empty, empty, manifest.shards[9], empty)
    write_manifest(copy, replace(manifest, shards=shards))
    reader, original = Reader(str(copy)), Reader(tiny_dataset)
    assert reader.num_samples == 17
    assert [reader.read(n).key for n in range(17)] == [original.read(n).key for n in [*range(10), *range(90, 97)]]
    draw_shapes(tmp_path / "few", 3)
    pack(str(tmp_path / "few"), str(tmp_path / "ones"), samples_per_shard=1, workers=1)
    assert len({Reader(str(tmp_path / "ones")).read(n).key for n in range(3)}) == 3


def test_runs_of_neighbours_hold_the_bytes_of_their_samples(tiny_dataset: str) -> None:
    reader = Reader(tiny_dataset)
    for ids in (range(0, 97), range(5, 6), range(8, 33), range(90, 97)):
        data = b"".join(reader.fetch_run(run) for run in reader.runs(ids))
        assert data == b"".join(reader.fetch(reader.place(sample_id)) for sample_id in ids)
