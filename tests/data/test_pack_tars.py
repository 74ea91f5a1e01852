import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from orchestrate.data.fsck import verify
from orchestrate.data.index import Manifest, load_manifest
from orchestrate.data.indexing import index
from orchestrate.data.pack import pack
from orchestrate.data.pack_shrink import Shrink
from orchestrate.errors import DataError
from tests.data.tars import tar_bytes, write_tar


def png(number: int, width: int = 9, height: int = 7) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def members(numbers: range) -> list[tuple[str, bytes]]:
    """Samples as others write them: a label from 0, 2, 4, and members that we do not know."""
    return [
        (f"d.1/{number:03d}.{ending}", contents)
        for number in numbers
        for ending, contents in (
            ("png", png(number)),
            ("cls", b"%d" % (number % 3 * 2)),
            ("meta.json", b"%d" % number),
        )
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tar(tmp_path / "shards/a.tar", members(range(8)), tarfile.GNU_FORMAT)
    write_tar(tmp_path / "shards/b.tar", members(range(8, 13)), tarfile.PAX_FORMAT)
    return tmp_path / "shards"


def repack(source: object, dest: Path, **options: Any) -> Manifest:
    return pack(str(source), str(dest), **({"samples_per_shard": 6, "workers": 1} | options))


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    urls = sorted(map(str, folder.glob("*.tar")))
    stock = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {sample["__key__"]: {name: data for name, data in sample.items() if name[0] != "_"} for sample in stock}


def test_shards_of_others_are_cut_anew_and_nothing_in_them_changes(shards: Path, tmp_path: Path) -> None:
    manifest = repack(shards, tmp_path / "packed")
    assert [shard.samples for shard in manifest.shards] == [6, 6, 1]
    assert samples_of(tmp_path / "packed") == samples_of(shards)
    assert list(samples_of(tmp_path / "packed")) != list(samples_of(shards))  # shuffled
    assert manifest.classes == ("0", "1", "2", "3", "4")  # labels keep their numbers, also where some are unused
    assert manifest.info["class_counts"] == [5, 0, 4, 0, 4]
    assert verify(str(tmp_path / "packed"), mode="decode").is_whole
    assert repack(shards, tmp_path / "packed", workers=2) == manifest  # nothing to do


@pytest.mark.parametrize(
    ("ending", "mode"), [("tgz", "w:gz"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")]
)
def test_compressed_tars_are_unpacked_for_it(shards: Path, tmp_path: Path, ending: str, mode: str) -> None:
    plain = repack(shards, tmp_path / "plain")
    for path in list(shards.glob("*.tar")):
        with tarfile.open(path) as tar, tarfile.open(path.with_name(f"{path.stem}.{ending}"), mode) as compressed:
            for member in tar:
                compressed.addfile(member, tar.extractfile(member))
        path.unlink()
    assert repack(shards, tmp_path / "packed", workers=2).digest == plain.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain", "shards"]


def test_damaged_compressed_tar_is_named(shards: Path, tmp_path: Path) -> None:
    (shards / "c.tgz").write_bytes(b"\x1f\x8b no gzip")
    (shards / "d.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError) as error:
        repack(shards, tmp_path / "packed")
    assert "c.tgz: cannot be decompressed" in str(error.value)
    assert "d.tar.zst: gzip, bzip2 and xz are read here, this is not; decompress it" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_patterns_and_other_stores_are_sources(shards: Path, tmp_path: Path) -> None:
    whole = repack(shards, tmp_path / "whole")
    assert repack(shards / "{a,b}.tar", tmp_path / "pattern").digest == whole.digest
    assert repack(shards / "a.tar", tmp_path / "one").num_samples == 8
    fsspec.filesystem("memory").put(str(shards), "/tars/train", recursive=True)
    assert repack("memory://tars/train", tmp_path / "remote").digest == whole.digest


def test_class_names_come_from_an_index_or_a_list(shards: Path, tmp_path: Path) -> None:
    names = ("ant", "bee", "cat", "dog", "elk", "fox")
    assert repack(shards, tmp_path / "list", classes=names).classes == names
    index(str(shards), classes=names)
    manifest = repack(shards, tmp_path / "index")
    assert manifest.classes == names
    assert samples_of(tmp_path / "index") == samples_of(shards)
    assert load_manifest(str(tmp_path / "list")).digest == manifest.digest
    with pytest.raises(DataError, match="cat: not among the 2 classes asked for"):
        repack(shards, tmp_path / "few", classes=("ant", "bee"))
    (shards / "manifest.json").unlink()
    with pytest.raises(DataError, match="2 classes given, labels go up to 4"):
        repack(shards, tmp_path / "few", classes=("ant", "bee"))


def test_labels_are_numbered_anew_by_the_names_of_another_dataset(shards: Path, tmp_path: Path) -> None:
    index(str(shards), classes=("ant", "bee", "cat", "dog", "elk"))
    packed = repack(shards, tmp_path / "packed", classes=("elk", "cat", "ant", "gnu"))
    assert packed.classes == ("elk", "cat", "ant", "gnu")  # bee and dog have no samples
    assert packed.info["class_counts"] == [4, 4, 5, 0]
    before, after = samples_of(shards), samples_of(tmp_path / "packed")
    anew = {b"0": b"2", b"2": b"1", b"4": b"0"}
    assert {key: sample["cls"] for key, sample in after.items()} == {
        key: anew[sample["cls"]] for key, sample in before.items()
    }


def test_split_samples_are_put_together(tmp_path: Path) -> None:
    whole = members(range(4))
    write_tar(tmp_path / "whole/a.tar", whole)
    write_tar(tmp_path / "split/a.tar", [*whole[::3], *whole[2::3], *whole[1::3]])
    digest = repack(tmp_path / "whole", tmp_path / "packed").digest
    assert repack(tmp_path / "split", tmp_path / "again", workers=2).digest == digest


def test_what_cannot_be_packed_is_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    good = repack(shards, tmp_path / "good", shuffle_seed=None)
    names = "duplicate", "first dot", "dot", "two images", "repeated", "unlabelled", "word", "identifier", "long"
    for number, (name, tar, _) in enumerate(bad_tars()):
        if name in (*names, "not decodable"):
            (shards / f"z{number:02d}.tar").write_bytes(tar)
    packed = repack(shards, tmp_path / "packed", skip_bad=True, shuffle_seed=None)
    assert packed.info["skipped"] == len(names) + 1
    assert samples_of(tmp_path / "packed") == samples_of(tmp_path / "good")
    assert packed.classes == good.classes
    assert verify(str(tmp_path / "packed"), mode="decode").is_whole
    with pytest.raises(DataError, match=r"samples that cannot be packed \(they can be left out with --skip-bad\)"):
        repack(shards, tmp_path / "other")
    write_tar(tmp_path / "bad/a.tar", [("x.txt", b"1")])
    with pytest.raises(DataError, match=r"samples that cannot be packed \(all of them\): 1 problem"):
        repack(tmp_path / "bad", tmp_path / "other", skip_bad=True)


def bad_tars() -> Iterator[tuple[str, bytes, str]]:
    image = png(1)
    whole = tar_bytes(members(range(20, 22)))
    yield "duplicate", tar_bytes([("d.1/003.png", image), ("d.1/003.cls", b"1")]), "same key `d.1/003` as"
    yield (
        "first dot",
        tar_bytes([("x.png", image), ("x.v2.png", image), ("x.cls", b"1")]),
        "another image of the same kind",
    )
    yield "dot", tar_bytes([("x.v2.png", image), ("x.cls", b"1")]), "no image: its members end in .cls, .v2.png"
    yield "two images", tar_bytes([("x.png", image), ("x.jpg", image), ("x.cls", b"1")]), "more than one image"
    yield "repeated", tar_bytes([("x.png", image), ("x.PNG", image), ("x.cls", b"1")]), "a second member of this name"
    yield "unlabelled", tar_bytes([("x.png", image)]), "key 'x': no label"
    yield "word", tar_bytes([("x.png", image), ("x.cls", b"dog")]), "label is no whole number"
    yield "identifier", tar_bytes([("x.png", image), ("x.cls", b"20240131")]), "a label 20240131: too large"
    yield "joined", whole + whole, "bytes after the end mark"
    yield "cut", whole[:-9000], "no end mark" if len(whole) % 10240 else "cut at byte"
    yield (
        "long",
        tar_bytes([(f"{'x' * 99}.png", image), (f"{'x' * 99}.cls", b"1")], tarfile.PAX_FORMAT),
        "too long for a tar",
    )
    yield "not decodable", tar_bytes([("x.png", b"text"), ("x.cls", b"1")]), "not an image"


@pytest.mark.parametrize(("tar", "message"), [pytest.param(tar, message, id=name) for name, tar, message in bad_tars()])
def test_what_is_wrong_with_tars_is_listed_and_nothing_is_left(
    shards: Path, tmp_path: Path, tar: bytes, message: str
) -> None:
    (shards / "z.tar").write_bytes(tar)
    with pytest.raises(DataError) as error:
        repack(shards, tmp_path / "packed")
    assert message in str(error.value)
    assert "z.tar" in str(error.value) or "label" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_what_holds_no_tars_is_said(tmp_path: Path) -> None:
    sources = {
        "memory://nowhere": "no tars|cannot be listed",
        str(tmp_path / "x.tar"): r"x\.tar: cannot be read",
        str(tmp_path / "*.tar"): "no tars",
    }
    for source, message in sources.items():
        with pytest.raises(DataError, match=message):
            repack(source, tmp_path / "packed")
    with pytest.raises(DataError, match="lies in the source folder"):
        write_tar(tmp_path / "in/a.tar", members(range(2)))
        repack(tmp_path / "in", tmp_path / "in/packed")


def test_a_tar_among_images_is_not_taken_for_the_dataset(shards: Path, tmp_path: Path) -> None:
    (shards / "class").mkdir()
    (shards / "class/x.png").write_bytes(png(1))
    assert repack(shards, tmp_path / "packed").classes == ("class",)


def test_large_images_are_scaled_down(tmp_path: Path) -> None:
    sides = {"wide": (40, 16), "tall": (16, 40), "small": (10, 8)}
    for name, (width, height) in sides.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{name}.png").write_bytes(png(1, width, height))
    manifest = repack(tmp_path / "images", tmp_path / "packed", shrink=Shrink(short_side=8, quality=85))
    samples = samples_of(tmp_path / "packed")
    assert Image.open(io.BytesIO(samples["wide"]["jpg"])).size == (20, 8)
    assert Image.open(io.BytesIO(samples["tall"]["jpg"])).size == (8, 20)
    assert samples["small"] == {"png": png(1, 10, 8)}  # small enough: every pixel is kept
    assert verify(str(tmp_path / "packed"), mode="decode").is_whole
    with pytest.raises(DataError, match="holds another dataset"):
        repack(tmp_path / "images", tmp_path / "packed", shrink=Shrink(short_side=8, quality=90))
    assert repack(tmp_path / "images", tmp_path / "packed", shrink=Shrink(short_side=8, quality=85)) == manifest


def test_scaled_images_of_tars_keep_their_other_members(shards: Path, tmp_path: Path) -> None:
    repack(shards, tmp_path / "packed", shrink=Shrink(short_side=4, quality=80), workers=2)
    before, after = samples_of(shards), samples_of(tmp_path / "packed")
    assert before.keys() == after.keys()
    for key, sample in after.items():
        assert sorted(sample) == ["cls", "jpg", "meta.json"]
        assert (sample["cls"], sample["meta.json"]) == (before[key]["cls"], before[key]["meta.json"])
