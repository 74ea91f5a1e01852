import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from orchestrate.data.index import Manifest, Shard, check_shards, dataset_identity, load_manifest, write_manifest
from orchestrate.errors import DataError
from tests.data.fault_proxy import FaultProxy
from tests.data.object_store import ObjectStore, object_store

__all__ = ["object_store"]


@pytest.fixture
def dataset(tiny_dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def test_identity_counts_contents_and_not_names(dataset: Path, tiny_dataset: str) -> None:
    assert dataset_identity(str(dataset)) == dataset_identity(tiny_dataset)
    digest, num_samples, classes = dataset_identity(dataset.as_uri())
    assert (len(digest), num_samples, len(classes)) == (64, 97, 4)
    manifest = load_manifest(str(dataset))
    first = manifest.shards[0]
    renamed = replace(manifest, shards=(replace(first, name="other.tar"), *manifest.shards[1:]), split="val", info={})
    assert renamed.digest == digest
    other_bytes = (replace(first, sha256="0" * 64), *manifest.shards[1:])
    assert replace(manifest, shards=other_bytes).digest != digest
    assert replace(manifest, shards=manifest.shards[::-1]).digest != digest
    assert replace(manifest, classes=("a", "b", "c", "d")).digest != digest


def test_manifest_survives_being_written(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    write_manifest(dataset, manifest)
    assert load_manifest(str(dataset)) == manifest
    assert not list(dataset.glob("*.part"))


def test_manifest_of_format_1_is_read_and_keeps_its_digest(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    shards = [
        {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256}
        for shard in manifest.shards
    ]
    old = {"format": 1, "split": "train", "classes": list(manifest.classes), "num_samples": 97,
           "digest": manifest.digest, "shards": shards, "info": dict(manifest.info)}  # fmt: skip
    (dataset / "manifest.json").write_text(json.dumps(old, indent=1))
    bare = tuple(replace(shard, sidecar_crc="") for shard in manifest.shards)
    assert load_manifest(str(dataset)) == replace(manifest, shards=bare)


def test_shards_of_older_manifests_have_no_checksum_of_their_sidecar(dataset: Path) -> None:
    file = dataset / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["checksum"]
    fields["shards"] = [row[:5] for row in fields["shards"]]
    file.write_text(json.dumps(fields))
    assert {shard.sidecar_crc for shard in load_manifest(str(dataset)).shards} == {""}


def test_manifest_knows_the_checksum_of_each_sidecar(dataset: Path) -> None:
    for shard in load_manifest(str(dataset)).shards:
        assert shard.sidecar_crc == f"{zlib.crc32((dataset / shard.sidecar).read_bytes()):08x}"


@pytest.mark.parametrize("name", ["split", "info", "base", "version"])
def test_damage_outside_the_digest_is_noticed(dataset: Path, name: str) -> None:
    file = dataset / "manifest.json"
    fields = json.loads(file.read_text())
    if name == "version":
        fields["shards"][0][4] = "etag:x"
    else:
        fields[name] = {"a": 1} if name == "info" else "x"
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="its checksum does not match"):
        load_manifest(str(dataset))


def test_layout_of_the_file_is_not_part_of_its_checksum(dataset: Path) -> None:
    file = dataset / "manifest.json"
    before = load_manifest(str(dataset))
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert load_manifest(str(dataset)) == before


def test_manifest_that_arrives_damaged_is_read_again(dataset: Path, object_store: ObjectStore) -> None:
    object_store.upload(dataset, "once-damaged")
    with FaultProxy(object_store.endpoint) as proxy:
        url = object_store.http_url("once-damaged", proxy.url)  # an S3 client checks what it gets by itself
        proxy.add("wrong", path="manifest.json", times=2)
        assert load_manifest(url) == load_manifest(str(dataset))
        assert proxy.counts["fault wrong"] == 2
        proxy.add("wrong", path="manifest.json", times=3)
        with pytest.raises(DataError, match="damaged"):
            load_manifest(url)


def test_digest_stays_what_it_was_in_format_1() -> None:
    manifest = Manifest((Shard("a.tar", 3, 10240, "ab" * 32), Shard("b.tar", 0, 10240, "cd" * 32, "v")), ("x", "é"))
    # SHA-256 of [1,["x","\\u00e9"],[[3,"abab..."],[0,"cdcd..."]]]; runs of years ago must find their data
    text = json.dumps([1, ["x", "é"], [[3, "ab" * 32], [0, "cd" * 32]]], separators=(",", ":"))
    assert manifest.digest == hashlib.sha256(text.encode()).hexdigest()
    assert manifest.digest.startswith("23fb79503fbf4279")


def test_tars_may_lie_elsewhere_and_sidecars_lie_beside_the_manifest(tmp_path: Path) -> None:
    shard = Shard("a.tar", 1, 10240, "ab" * 32, "etag")
    away = Manifest((shard,), base="s3://bucket/train")
    assert away.shard_url("data/in1k", shard) == "s3://bucket/train/a.tar"
    assert away.sidecar_url("data/in1k", shard) == "data/in1k/a.tar.idx"
    assert Manifest((shard,)).shard_url("data/in1k", shard) == "data/in1k/a.tar"
    write_manifest(str(tmp_path / "new"), away)
    assert load_manifest(str(tmp_path / "new")) == away
    with pytest.raises(DataError, match=r"1 file is not .*\n  a\.tar\.idx: missing$"):
        check_shards(str(tmp_path / "new"), away)  # the tar is remote, so nobody asks for it


def test_a_hundred_thousand_shards_are_loaded_in_little_memory(tmp_path: Path) -> None:
    shards = tuple(Shard(f"train-{n:06d}.tar", 10_000, 970_000_000, f"{n:064x}", f"{n:032x}") for n in range(100_000))
    manifest = Manifest(shards, base="s3://bucket/train")
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").stat().st_size < 16e6
    del shards
    tracemalloc.start()
    loaded = load_manifest(str(tmp_path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded == manifest
    # Three texts and a record a shard take 400 bytes; while it is read, the JSON and its lists come on top.
    assert kept < 60e6
    assert peak < 160e6


def test_missing_manifest_says_how_to_make_it(tmp_path: Path) -> None:
    for url in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(
            DataError, match=rf"{url}: no manifest.json; make it with `orchestrate data pack SOURCE {url}`"
        ):
            load_manifest(url)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda fields: fields | {"format": 3}, "format 3, this version reads 1 and 2"),
        (lambda fields: fields | {"shards": [["x", 1]]}, r"damaged \(ValueError"),
        (lambda fields: fields | {"classes": ["a"]}, "digest does not match"),
        (lambda fields: fields | {"shards": [{"name": "x"}]}, r"damaged \(KeyError"),
        (lambda fields: ["no", "object"], r"damaged \(TypeError"),
    ],
)
def test_damaged_manifest_is_refused(dataset: Path, edit, message: str) -> None:
    file = dataset / "manifest.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(DataError, match=rf"manifest.json: .*{message}"):
        load_manifest(str(dataset))


def test_cut_manifest_is_refused_at_every_length(dataset: Path) -> None:
    file = dataset / "manifest.json"
    text = file.read_bytes()
    for length in range(0, len(text), 97):
        file.write_bytes(text[:length])
        with pytest.raises(DataError, match="damaged"):
            load_manifest(str(dataset))


def test_manifest_without_samples_is_refused(dataset: Path) -> None:
    write_manifest(dataset, replace(load_manifest(str(dataset)), shards=()))
    with pytest.raises(DataError, match="holds no samples"):
        load_manifest(str(dataset))


def test_missing_and_cut_files_are_named(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    check_shards(str(dataset), manifest)
    (dataset / "train-000001.tar").unlink()
    (dataset / "train-000002.tar.idx").write_bytes(b"x" * 79)
    with (dataset / "train-000003.tar").open("ab") as shard:
        shard.write(b"x")
    with pytest.raises(DataError) as error:
        check_shards(str(dataset), manifest)
    assert "3 files are not what manifest.json says" in str(error.value)
    assert "train-000001.tar: missing" in str(error.value)
    assert "train-000002.tar.idx: 79 bytes, should be 80" in str(error.value)
    assert "train-000003.tar: " in str(error.value)


def test_only_ten_files_are_listed(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    for file in dataset.glob("*.tar*"):
        file.unlink()
    with pytest.raises(DataError, match=r"20 files[^$]*and 10 more"):
        check_shards(str(dataset), manifest)


def test_a_dataset_in_another_store_is_found(dataset: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(dataset), "/bucket/train", recursive=True)
    manifest = load_manifest("memory://bucket/train")
    assert manifest == load_manifest(str(dataset))
    with pytest.raises(DataError, match="no manifest"):
        load_manifest("memory://bucket/val")
    with pytest.raises(DataError, match="cannot open this kind of URL"):
        load_manifest("nosuchstore://bucket/train")


def test_index_starts_without_numpy_and_torch() -> None:
    code = "import orchestrate.data.index, sys; print({'torch', 'numpy', 'fsspec'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
