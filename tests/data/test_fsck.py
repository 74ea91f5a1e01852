import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from orchestrate.data.fsck import Verdict, verify
from orchestrate.data.index import load_manifest, write_manifest
from orchestrate.data.indexing import index
from orchestrate.data.shards import load_sidecar
from tests.data.tars import tar_bytes, write_tar
from tests.datasets import draw_shapes


@pytest.fixture
def dataset(tiny_dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two shards that were indexed, not packed: their samples are named by class, their images are real."""
    draw_shapes(tmp_path / "images", 8, size=8)
    paths = sorted((tmp_path / "images").rglob("*.png"))
    for number in range(2):
        listed = [(f"{path.stem}.{ending}", data) for path in paths[number::2]
                  for ending, data in (("png", path.read_bytes()), ("cls", b"%d" % number))]  # fmt: skip
        write_tar(tmp_path / f"foreign/{number}.tar", listed)
    index(str(tmp_path / "foreign"))
    return tmp_path / "foreign"


def said(verdict: Verdict) -> str:
    return "\n".join(map(str, verdict.problems))


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    """Edit a file, keeping its date: damage of a disk does not show there."""
    status, data = path.stat(), bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(data: bytearray, place: int) -> None:
    data[place] ^= 0x10


@pytest.mark.parametrize("mode", ["quick", "full", "decode"])
def test_whole_dataset_is_whole(dataset: Path, foreign: Path, mode) -> None:
    for folder, num_shards, num_samples in ((dataset, 10, 97), (foreign, 2, 8)):
        verdict = verify(str(folder), mode=mode)
        assert said(verdict) == ""
        assert verdict == Verdict(str(folder), mode, num_shards, num_samples, ())
        assert verify(str(folder), mode=mode, repair=True) == verdict


def test_report_is_json(dataset: Path) -> None:
    change(dataset / "train-000002.tar", lambda data: flip(data, 600))
    facts = json.loads(json.dumps(verify(str(dataset), mode="full").as_facts()))
    (problem,) = facts.pop("problems")
    assert facts == {
        "url": str(dataset), "mode": "full", "ok": False, "shards": 10, "samples": 97, "repaired": [], "notes": []
    }  # fmt: skip
    assert (problem["shard"], problem["sample"], set(problem)) == (
        "train-000002.tar", 0, {"shard", "sample", "key", "member", "reason"}
    )  # fmt: skip


def test_every_cut_of_a_shard_is_seen_quickly(foreign: Path) -> None:
    whole = (foreign / "1.tar").read_bytes()
    for length in range(0, len(whole), 512):  # also those of the padding: the manifest knows the size
        change(foreign / "1.tar", lambda data, length=length: data.__delitem__(slice(length, None)))
        verdict = verify(str(foreign))
        assert f"1.tar: {length:,} bytes, should be {len(whole):,}: cut" in said(verdict)
        change(foreign / "1.tar", lambda data: data.__setitem__(slice(0, None), whole))
    assert verify(str(foreign)).is_whole


def test_every_damaged_byte_of_a_shard_is_found_and_its_sample_named(foreign: Path) -> None:
    path = foreign / "0.tar"
    num_bytes, entries = path.stat().st_size, load_sidecar(str(path) + ".idx")
    ends = [sum(length for length, _ in entries[: number + 1]) for number in range(len(entries))]
    for place in range(0, num_bytes, 211):
        change(path, lambda data, place=place: flip(data, place))
        verdict = verify(str(foreign), mode="full")
        expected = next((number for number, end in enumerate(ends) if place < end), -1)
        assert [(problem.shard, problem.sample) for problem in verdict.problems] == [("0.tar", expected)], place
        change(path, lambda data, place=place: flip(data, place))
    assert verify(str(foreign), mode="full").is_whole


def test_damage_names_shard_sample_key_and_member(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    lengths = [length for length, _ in load_sidecar(str(dataset / "train-000001.tar.idx"))]
    # Members are sorted by name: the label's header and contents, the image's header, then the image.
    change(dataset / "train-000001.tar", lambda data: flip(data, sum(lengths[:3]) + 3 * 512 + 40))
    (problem,) = verify(str(dataset), mode="full").problems
    assert (problem.shard, problem.sample) == ("train-000001.tar", 3)
    assert problem.member == f"{problem.key}.png"
    assert problem.reason.startswith("CRC32 is ")
    assert manifest.shards[1].name == problem.shard


def test_quick_check_finds_what_needs_no_reading(dataset: Path) -> None:
    (dataset / "train-000000.tar").unlink()
    (dataset / "train-000001.tar.idx").unlink()
    (dataset / "train-000002.tar.idx").write_bytes(b"x" * 79)
    (dataset / "train-000003.tar.idx").write_bytes(b"\xff" * 80)
    change(dataset / "train-000004.tar", lambda data: data.__setitem__(slice(-1, None), b""))
    end = sum(length for length, _ in load_sidecar(str(dataset / "train-000005.tar.idx")))
    change(dataset / "train-000005.tar", lambda data: flip(data, end + 10))
    shutil.copy(dataset / "train-000006.tar", dataset / "extra.tar")
    text = said(verify(str(dataset)))
    for line in (
        "extra.tar: not in the manifest",
        "train-000000.tar: missing",
        "train-000001.tar: its index train-000001.tar.idx is missing; --repair",
        "train-000002.tar: its index train-000002.tar.idx cannot be read: 79 bytes",
        "train-000003.tar: its index train-000003.tar.idx is damaged: its samples are longer",
        f"train-000004.tar: {(dataset / 'train-000004.tar').stat().st_size:,} bytes, should be",
        f"train-000005.tar: no end mark at byte {end:,}",
    ):
        assert line in text
    assert len(text.splitlines()) == 7


def test_missing_and_damaged_sidecars_are_repaired(dataset: Path) -> None:
    whole = {path.name: path.read_bytes() for path in dataset.iterdir()}
    for mode in ("quick", "full"):
        (dataset / "train-000001.tar.idx").unlink()
        (dataset / "train-000002.tar.idx").write_bytes(b"\xff" * 80)
        if mode == "full":  # one wrong checksum: its size says nothing
            change(dataset / "train-000003.tar.idx", lambda data: flip(data, 14))
            assert "train-000003.tar.idx is damaged: CRC32" in said(verify(str(dataset)))
            assert "its index train-000003.tar.idx is damaged: CRC32 is " in said(verify(str(dataset), mode=mode))
        verdict = verify(str(dataset), mode=mode, repair=True)
        assert said(verdict) == ""
        assert len(verdict.repaired) == (3 if mode == "full" else 2)
        assert {path.name: path.read_bytes() for path in dataset.iterdir()} == whole


def test_sidecar_of_a_damaged_shard_is_not_made_again(dataset: Path) -> None:
    (dataset / "train-000001.tar.idx").unlink()
    change(dataset / "train-000001.tar", lambda data: flip(data, 3000))
    verdict = verify(str(dataset), repair=True)
    assert "its SHA-256 is not that of the manifest" in said(verdict)
    assert verdict.repaired == ()
    assert not (dataset / "train-000001.tar.idx").exists()


def test_touched_shard_is_told_from_a_changed_one(foreign: Path) -> None:
    os.utime(foreign / "0.tar")
    for mode in ("quick", "full"):  # local dates do not matter: each copy has others
        verdict = verify(str(foreign), mode=mode)
        assert verdict.is_whole
        assert [note.split(",")[0] for note in verdict.notes] == ["1 shard copied or touched since the index was made"]
    repaired = verify(str(foreign), mode="full", repair=True)
    assert (repaired.is_whole, repaired.repaired) == (True, ("0.tar",))
    assert verify(str(foreign)).notes == ()


def test_checksums_of_sidecars_are_recorded_for_older_manifests(foreign: Path) -> None:
    manifest = load_manifest(str(foreign))
    for wrong in ("", "00000000"):
        shards = tuple(replace(shard, sidecar_crc=wrong) for shard in manifest.shards)
        write_manifest(foreign, replace(manifest, shards=shards))
        assert verify(str(foreign)).is_whole is (wrong == "")
        assert verify(str(foreign), mode="full", repair=True).is_whole
        assert load_manifest(str(foreign)) == manifest


def test_report_of_names_that_are_no_text_is_valid_json(foreign: Path) -> None:
    listed = [("\udcff.png", b"no image"), ("\udcff.cls", b"1")]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, contents in listed:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    (foreign / "2.tar").write_bytes(file.getvalue())
    index(str(foreign))
    text = json.dumps(verify(str(foreign), mode="decode").as_facts())
    assert json.loads(text)["problems"][0]["key"] == "\\udcff"
    assert "\\\\udcff" in text  # an escaped backslash, not half of a pair


def test_undecodable_images_are_named(foreign: Path) -> None:
    write_tar(foreign / "2.tar", [("broken.png", b"\x89PNG no image"), ("broken.cls", b"0")])
    index(str(foreign))
    assert verify(str(foreign), mode="full").is_whole
    (problem,) = verify(str(foreign), mode="decode").problems
    assert (problem.shard, problem.sample, problem.key, problem.member) == ("2.tar", 0, "broken", "broken.png")
    assert "not an image" in problem.reason


def test_what_stock_readers_would_take_wrongly_is_named(foreign: Path) -> None:
    image = (foreign.parent / "images/disc/000000.png").read_bytes()
    listed = [("a.png", image), ("b.png", image), ("b.cls", b"1"), ("a.cls", b"1"),  # split
              ("img.png", image), ("img.v2.png", image), ("img.cls", b"1"),  # first dot
              ("c.cls", b"7"), ("c.png", image)]  # fmt: skip
    write_tar(foreign / "2.tar", listed)
    write_tar(foreign / "3.tar", [("b.png", image), ("b.cls", b"1")])
    index(str(foreign), classes=list("abcdefgh"))
    text = said(verify(str(foreign), mode="full"))
    for line in ("2.tar: sample 0, key 'a': no label", "2.tar: sample 2, key 'a': no image",
                 "2.tar: sample 2, key 'a': split sample: other members of this key lie earlier",
                 "2.tar: sample 3, key 'img', member 'img.v2.png': another image of the same kind",
                 "3.tar: sample 0, key 'b': duplicate key: a sample of an earlier shard has it"):  # fmt: skip
        assert line in text
    assert len(text.splitlines()) == 5


def test_labels_beyond_the_classes_are_named(foreign: Path) -> None:
    write_manifest(foreign, replace(load_manifest(str(foreign)), classes=("only",)))
    text = said(verify(str(foreign), mode="full"))
    assert "key '000007', member '000007.cls': label 1, classes are 0 to 0" in text
    assert len(text.splitlines()) == 4


def test_cut_that_was_accepted_is_no_news(foreign: Path) -> None:
    path = foreign / "1.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    index(str(foreign), accept_cut=True)
    for mode in ("quick", "full"):
        assert verify(str(foreign), mode=mode).is_whole


def test_empty_shards_are_whole(foreign: Path) -> None:
    (foreign / "2.tar").write_bytes(tar_bytes([]))
    index(str(foreign))
    for mode in ("quick", "full", "decode"):
        assert verify(str(foreign), mode=mode).is_whole


def test_index_in_a_side_location_is_verified(foreign: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(foreign), "/fsck/train", recursive=True)
    url = str(tmp_path / "side")
    index("memory://fsck/train", dest=url)
    for mode in ("quick", "full", "decode"):
        assert verify(url, mode=mode).is_whole
    store.pipe_file("/fsck/train/1.tar", (foreign / "0.tar").read_bytes())
    assert "1.tar: changed since it was indexed" in said(verify(url))
    assert "1.tar: sample 0" in said(verify(url, mode="full", repair=True))
    store.store.clear()
    assert "0.tar: missing" in said(verify(url))


def test_report_does_not_depend_on_workers(dataset: Path) -> None:
    for number in range(0, 10, 3):
        change(dataset / f"train-{number:06d}.tar", lambda data: flip(data, 900))
    one = verify(str(dataset), mode="full", workers=1)
    assert len(one.problems) == 4
    assert verify(str(dataset), mode="full", workers=8) == one
