import gzip
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset

from orchestrate.data.fsck import verify
from orchestrate.data.index import check_shards, load_manifest
from orchestrate.data.indexing import index
from orchestrate.data.shard_pool import ShardProgress
from orchestrate.data.shards import load_sidecar, read_sample
from orchestrate.errors import DataError
from tests.data.fault_proxy import FaultProxy
from tests.data.object_store import BUCKET, ObjectStore, object_store
from tests.data.tars import members, shards, tar_bytes, write_tar

__all__ = ["object_store", "shards"]  # fixtures


def keys_of(url: str) -> list[str]:
    manifest = load_manifest(url)
    return [
        read_sample(manifest.shard_url(url, shard), manifest.sidecar_url(url, shard), number)[0]
        for shard in manifest.shards
        for number in range(shard.samples)
    ]


def stock_keys(folder: Path) -> list[str]:
    urls = sorted(map(str, folder.glob("*.tar")))
    return [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]


def test_foreign_shards_are_indexed_beside_themselves(shards: Path) -> None:
    report = index(str(shards))
    manifest = load_manifest(str(shards))
    assert manifest == report.manifest
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a.tar", 5), ("b.tar", 0), ("c.tar", 4)]
    assert (manifest.base, manifest.classes, manifest.info["class_counts"]) == ("", ("0", "1", "2"), [4, 3, 2])
    assert (report.counts, report.problems) == ({}, ())
    check_shards(str(shards), manifest)
    assert keys_of(str(shards)) == stock_keys(shards)


def test_index_of_a_pack_is_that_of_the_packer(tiny_dataset: str, tmp_path: Path) -> None:
    packed = load_manifest(tiny_dataset)
    report = index(tiny_dataset, dest=str(tmp_path / "index"), classes=packed.classes)
    assert report.manifest.digest == packed.digest
    assert report.manifest.base == tiny_dataset
    assert index(tiny_dataset, dest=str(tmp_path / "other")).manifest.classes == packed.classes
    for shard in packed.shards:
        sidecar = (tmp_path / "index" / shard.sidecar).read_bytes()
        assert sidecar == (Path(tiny_dataset) / shard.sidecar).read_bytes()
    assert keys_of(str(tmp_path / "index")) == keys_of(tiny_dataset)


def test_shards_of_another_store_are_indexed_into_a_side_location(shards: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/indexing/train", recursive=True)
    report = index("memory://indexing/train", dest=str(tmp_path / "index"))
    assert report.manifest.base == "memory://indexing/train"
    assert all(shard.version for shard in report.manifest.shards)
    assert keys_of(str(tmp_path / "index")) == stock_keys(shards)
    beside = index("memory://indexing/train", split="val").manifest
    assert (beside.base, beside.split, beside.digest) == ("", "val", report.manifest.digest)
    assert keys_of("memory://indexing/train") == stock_keys(shards)
    beside_them = {name.rpartition("/")[2] for name in store.find("/indexing/train")}
    assert beside_them == {"manifest.json", "index-records.jsonl",
                           *(f"{name}.tar{ending}" for name in "abc" for ending in ("", ".idx"))}  # fmt: skip


def test_index_is_written_into_a_bucket_beside_the_shards(
    shards: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(object_store.endpoint) as proxy:
        object_store.use(monkeypatch, endpoint=proxy.url)
        url = object_store.upload(shards, "beside")
        proxy.add("503", path="a.tar", times=2)
        proxy.add("half", path="c.tar")
        first = index(url)
        assert proxy.counts["fault 503"] == 2
        assert first.manifest.digest == index(str(shards)).manifest.digest
        assert keys_of(url) == stock_keys(shards)
        before = sum("a.tar" in path and asked.startswith("bytes=0-") for _, path, asked in proxy.requests)
        assert index(url).manifest == first.manifest
        after = sum("a.tar" in path and asked.startswith("bytes=0-") for _, path, asked in proxy.requests)
        assert after == before  # what was read and has not changed is not read again
        assert "Contents" not in object_store.client.list_objects_v2(Bucket=BUCKET, Prefix="beside/index-records/")
        assert verify(url, mode="full").is_whole


def test_pattern_chooses_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    manifest = index("shards/{a,c}.tar", dest="index").manifest
    assert [shard.name for shard in manifest.shards] == ["a.tar", "c.tar"]
    assert manifest.base == str(shards)  # found from any folder
    with pytest.raises(DataError, match=r"shards/x\.tar: no such shard; 2 of 3 are missing; check the pattern"):
        index("shards/{a,x,z}.tar", dest="other")
    monkeypatch.chdir(shards)
    assert [shard.name for shard in index("[ac].tar", dest="../here").manifest.shards] == ["a.tar", "c.tar"]
    assert [shard.name for shard in index("a.tar", dest="../one").manifest.shards] == ["a.tar"]


def test_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(DataError, match=r"train\.py: a file, and not a tar by its name; give a folder"):
        index(str(tmp_path / "train.py"))


@pytest.mark.parametrize("ending", ["tgz", "tar.gz", "tar.zst"])
def test_compressed_tars_are_named_with_the_ways_out(shards: Path, ending: str) -> None:
    (shards / f"d.{ending}").write_bytes(gzip.compress((shards / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=rf"compressed: 1 of 4 tars, such as d\.{ending}.*data pack.*decompress"):
        index(str(shards))


def test_nothing_to_index_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        index(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no \.tar files"):
        index(str(tmp_path))
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="1 tar without any sample"):
        index(str(tmp_path))


def test_cut_tars_are_refused_unless_accepted(shards: Path) -> None:
    whole = (shards / "c.tar").read_bytes()
    (shards / "c.tar").write_bytes(whole[: 4 * 1024 + 600])  # within the first member of the third sample
    with pytest.raises(DataError, match=r"(?s)not whole: 1 of 3 tars;.*--accept-cut.*c\.tar: cut at byte 4,696"):
        index(str(shards))
    assert not (shards / "manifest.json").exists()
    report = index(str(shards), accept_cut=True)
    assert [shard.samples for shard in report.manifest.shards] == [5, 0, 2]
    assert report.counts == {"cut": 1}
    assert report.manifest.info["cut"] == ["c.tar"]
    assert keys_of(str(shards))[-1] == "99-1"


def test_joined_tars_are_refused_unless_accepted(shards: Path) -> None:
    joined = (shards / "a.tar").read_bytes() + (shards / "c.tar").read_bytes()
    (shards / "a.tar").write_bytes(joined)
    with pytest.raises(DataError, match=r"(?s)1 of 3 tars.*--accept-cut.*a\.tar: bytes after the end mark"):
        index(str(shards))
    report = index(str(shards), accept_cut=True)
    assert [shard.samples for shard in report.manifest.shards] == [5, 0, 4]
    assert report.counts["cut"] == 1
    verdict = verify(str(shards), mode="full")
    assert (verdict.is_whole, verdict.notes) == (True, (
        "a.tar: was cut when it was indexed with --accept-cut: samples beyond the cut are not in the index",
    ))  # fmt: skip


def test_samples_that_training_cannot_use_are_counted_once(shards: Path) -> None:
    assert index(str(shards)).unusable == 0
    broken = [("x.txt", b"1"), ("y.jpg", b"1"), ("z.jpg", b""), ("z.cls", b"1"), ("w.jpg", b"1"), ("w.cls", b"dog"),
              ("v.jpg", b"1"), ("v.png", b"1"), ("v.cls", b"1"), ("u.jpg", b"1"), ("u.JPG", b"1"), ("u.cls", b"1"),
              ("good.jpg", b"1"), ("good.cls", b"1")]  # fmt: skip
    write_tar(shards / "d.tar", broken)
    assert index(str(shards)).unusable == 6
    write_tar(shards.parent / "unlabelled/a.tar", [("x.txt", b"1"), ("y.jpg", b"1")])
    assert index(str(shards.parent / "unlabelled")).unusable == 1


def test_keys_in_several_shards_are_named(shards: Path) -> None:
    write_tar(shards / "d.tar", [*members(ord("d"), 2), *members(ord("a"), 2)])
    report = index(str(shards))
    assert report.counts == {"duplicate key": 2}
    assert [(problem.shard, problem.sample, problem.key) for problem in report.problems] == [
        ("d.tar", 2, "97-0"),
        ("d.tar", 3, "97-1"),
    ]


def test_problems_are_counted_and_named(shards: Path) -> None:
    write_tar(shards / "d.tar", [("x.cls", b"1"), ("y.jpg", b"1"), ("x.jpg", b"1")])
    report = index(str(shards))
    assert report.counts == {"no image": 1, "no label": 2, "split sample": 1}
    assert report.manifest.info["problems"] == report.counts
    assert {(problem.shard, problem.sample, problem.key) for problem in report.problems} == {
        ("d.tar", 0, "x"), ("d.tar", 1, "y"), ("d.tar", 2, "x")
    }  # fmt: skip


def test_unlabelled_data_has_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"1")])
    report = index(str(tmp_path))
    assert (report.manifest.classes, report.manifest.info["class_counts"], report.counts) == ((), [], {})
    with pytest.raises(DataError, match="2 classes given, and no sample has a label"):
        index(str(tmp_path), classes=["x", "y"])


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.suffix == ".idx"}


def test_only_changed_shards_are_read_again(shards: Path) -> None:
    first, before = index(str(shards)).manifest, inodes(shards)
    assert index(str(shards)).manifest == first
    assert inodes(shards) == before
    write_tar(shards / "b.tar", members(ord("b"), 2))
    write_tar(shards / "d.tar", members(ord("d"), 1))
    (shards / "c.tar.idx").unlink()
    second = index(str(shards)).manifest
    assert [shard.samples for shard in second.shards] == [5, 2, 4, 1]
    after = inodes(shards)
    assert after["a.tar.idx"] == before["a.tar.idx"]
    assert keys_of(str(shards)) == stock_keys(shards)


KILLED = """
import os, signal, sys
from orchestrate.data.indexing import index

def kill(progress):
    if progress.shards >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

index(sys.argv[1], workers=2, progress=kill)
"""


def test_killed_index_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for number in range(30):
        write_tar(tmp_path / f"shards/{number:02d}.tar", members(number, 3))
    url = str(tmp_path / "shards")
    killed = subprocess.run([sys.executable, "-c", KILLED, url], check=False)
    assert killed.returncode == -9
    done = sorted((tmp_path / "shards/index-records").glob("*.tar.json"))
    kept = inodes(tmp_path / "shards")
    assert 5 <= len(done) < 30
    assert not (tmp_path / "shards/manifest.json").exists()
    resumed = index(url).manifest
    for path in done:
        name = path.name.replace(".json", ".idx")
        assert inodes(tmp_path / "shards")[name] == kept[name]
    fresh = index(url, dest=str(tmp_path / "fresh")).manifest
    assert resumed.digest == fresh.digest
    assert resumed.shards == fresh.shards


def test_damaged_record_is_made_anew(shards: Path) -> None:
    first = index(str(shards)).manifest
    record = shards / "index-records.jsonl"
    text = record.read_text()
    for damaged in (text[:50], "[]", json.dumps({"format": 99})):
        record.write_text(damaged)
        assert index(str(shards)).manifest == first
        assert record.read_text() == text
        assert not (shards / "index-records").exists()


def test_number_of_workers_does_not_change_the_index(shards: Path, tmp_path: Path) -> None:
    one = index(str(shards), dest=str(tmp_path / "one"), workers=1).manifest
    assert index(str(shards), dest=str(tmp_path / "eight"), workers=8).manifest == one


def test_progress_counts_shards_and_bytes(shards: Path) -> None:
    seen: list[ShardProgress] = []
    index(str(shards), progress=seen.append)
    num_bytes = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert seen[-1] == ShardProgress(3, 3, num_bytes, num_bytes)
    index(str(shards), progress=seen.append)  # what was done before counts too
    assert seen[-1] == ShardProgress(3, 3, num_bytes, num_bytes)


@pytest.fixture
def web(shards: Path, object_store: ObjectStore) -> Iterator[FaultProxy]:
    """The shards behind a plain web server, which lists nothing and cannot be written."""
    for path in shards.iterdir():
        object_store.client.put_object(
            Bucket="datasets", Key=f"web/{path.name}", Body=path.read_bytes(), ACL="public-read"
        )
    with FaultProxy(object_store.endpoint) as proxy:
        yield proxy


def test_shards_behind_a_web_server_are_indexed_by_pattern(web: FaultProxy, shards: Path, tmp_path: Path) -> None:
    url = f"{web.url}/datasets/web/{{a,b,c}}.tar"
    with pytest.raises(DataError, match=r"the index cannot be written there: .*read only.*--to FOLDER"):
        index(url)
    web.add("503", path="a.tar", times=2)
    web.add("half", path="c.tar")
    manifest = index(url, dest=str(tmp_path / "index")).manifest
    assert (web.counts["fault 503"], web.counts["fault half"]) == (2, 1)
    assert manifest.base == f"{web.url}/datasets/web"
    assert keys_of(str(tmp_path / "index")) == stock_keys(shards)


def test_shard_that_changes_while_it_is_read_is_refused(web: FaultProxy, tmp_path: Path) -> None:
    web.add("etag", path="a.tar", method="HEAD", skip=1, times=-1)
    with pytest.raises(DataError, match=r"a\.tar: changed while it was read; index again"):
        index(f"{web.url}/datasets/web/a.tar", dest=str(tmp_path / "index"))


def test_changed_version_is_read_again(web: FaultProxy, tmp_path: Path) -> None:
    url = f"{web.url}/datasets/web/a.tar"
    first = index(url, dest=str(tmp_path / "index")).manifest
    before = inodes(tmp_path / "index")
    web.add("etag", path="a.tar", method="HEAD", times=-1)
    second = index(url, dest=str(tmp_path / "index")).manifest
    assert second.digest == first.digest
    assert second.shards[0].version != first.shards[0].version
    assert inodes(tmp_path / "index") != before


@pytest.fixture(autouse=True)
def clean_memory_store() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def test_long_names_and_folders_go_with_the_sample_that_follows(tmp_path: Path) -> None:
    listed = [("d", None), (f"d/{'x' * 150}.jpg", b"1"), (f"d/{'x' * 150}.cls", b"0"), ("e", None),
              (f"e/{'y' * 150}.jpg", b"1"), (f"e/{'y' * 150}.cls", b"0"), ("f", None)]  # fmt: skip
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "a.tar").write_bytes(tar_bytes(listed, tar_format))
        index(str(tmp_path))
        assert keys_of(str(tmp_path)) == stock_keys(tmp_path) == [f"d/{'x' * 150}", f"e/{'y' * 150}"]
        lengths = [length for length, _ in load_sidecar(str(tmp_path / "a.tar.idx"))]
        end = sum(lengths)
        assert (tmp_path / "a.tar").read_bytes()[end : end + 1024] == bytes(1024)
