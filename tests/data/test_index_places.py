"""Whose index lies where, and that none replaces another's."""

import shutil
from pathlib import Path

import pytest

from orchestrate.data.fsck import verify
from orchestrate.data.index import load_manifest
from orchestrate.data.index_records import write_owner
from orchestrate.data.indexing import index
from orchestrate.errors import DataError
from tests.data.object_store import ObjectStore, object_store
from tests.data.tars import members, shards, write_tar

__all__ = ["object_store", "shards"]  # fixtures


def test_index_of_another_pattern_is_not_overwritten(shards: Path, tmp_path: Path) -> None:
    first = index(str(shards / "{a,b}.tar")).manifest
    for other in (shards / "c.tar", shards):
        with pytest.raises(DataError, match=rf"holds the index of {shards}/\{{a,b\}}\.tar, not of {other}; .*--to"):
            index(str(other))
        assert load_manifest(str(shards)) == first
    assert index(str(shards / "c.tar"), dest=str(tmp_path / "c")).manifest.num_samples == 4
    assert index(str(shards), overwrite=True).manifest.num_samples == 9


def test_packed_dataset_has_its_index(tiny_dataset: str) -> None:
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"a packed dataset, which has its index; mend it with .*verify .*--repair"):
            index(tiny_dataset, overwrite=overwrite)


@pytest.mark.parametrize("finished", [True, False])
def test_copied_folder_is_indexed_where_it_is(shards: Path, tmp_path: Path, finished: bool) -> None:
    first = index(str(shards)).manifest
    if not finished:
        (shards / "manifest.json").unlink()
        write_owner(str(shards), "")
    shutil.move(shards, tmp_path / "moved")
    again = index(str(tmp_path / "moved")).manifest
    assert (again.digest, again.base) == (first.digest, "")
    assert verify(str(tmp_path / "moved"), mode="full").is_whole


def test_index_elsewhere_follows_shards_that_moved(shards: Path, tmp_path: Path) -> None:
    side = str(tmp_path / "index")
    index(str(shards), dest=side, classes=["a", "b", "c"])
    shutil.move(shards, tmp_path / "moved")
    with pytest.raises(DataError, match="--overwrite"):
        index(str(tmp_path / "moved"), dest=side)
    assert index(str(tmp_path / "moved"), dest=side, overwrite=True).manifest.base == str(tmp_path / "moved")


def test_local_index_is_read_from_a_bucket(
    shards: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = index(str(shards)).manifest
    object_store.use(monkeypatch)
    url = object_store.upload(shards, "indexed-here")
    assert load_manifest(url) == manifest
    for mode in ("quick", "full"):
        assert verify(url, mode=mode).is_whole


def test_index_of_other_shards_is_not_overwritten(shards: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "others/a.tar", members(9, 2))
    index(str(shards), dest=str(tmp_path / "index"))
    with pytest.raises(DataError, match=f"holds the index of {shards}, not of .*; choose another folder with --to"):
        index(str(tmp_path / "others"), dest=str(tmp_path / "index"))
    (tmp_path / "index/manifest.json").unlink()  # an unfinished one counts too
    write_owner(str(tmp_path / "index"), str(shards))
    with pytest.raises(DataError, match="holds the index of"):
        index(str(tmp_path / "others"), dest=str(tmp_path / "index"))
    index(str(tmp_path / "others"))
    with pytest.raises(DataError, match="holds the index of"):
        index(str(shards), dest=str(tmp_path / "others"))


def test_folder_that_cannot_be_written_says_where_else(shards: Path) -> None:
    (shards / "index-records").touch()  # root may write where it likes, but not into a file
    with pytest.raises(DataError, match=r"the index cannot be written there.*--to FOLDER"):
        index(str(shards))
