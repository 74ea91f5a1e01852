import hashlib
import io
import struct
import tarfile
import zlib
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrate.data.shards import unpack_sample
from orchestrate.data.tar_scan import Scan, scan_tar
from tests.data.tars import stock_samples, tar_bytes

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def scan(tar: bytes, piece: int = 1 << 20) -> Scan:
    return scan_tar("s.tar", (tar[start : start + piece] for start in range(0, len(tar), piece)))


def ranges(tar: bytes, found: Scan) -> list[bytes]:
    """Cut the samples out of a tar, checking each checksum."""
    entries = list(struct.iter_unpack("<II", found.entries))
    ends = list(accumulate(length for length, _ in entries))
    cut = [tar[end - length : end] for end, (length, _) in zip(ends, entries, strict=True)]
    assert [zlib.crc32(data) for data in cut] == [crc for _, crc in entries]
    return cut


def our_samples(tar: bytes, found: Scan) -> list[dict[str, object]]:
    return [{"__key__": key, **members} for key, members in map(unpack_sample, ranges(tar, found))]


words = st.sampled_from(["a", "b", "A", "é", ".", "..", "__", "x" * 60, "y" * 120, "-", " "])
plain = st.lists(words, min_size=1, max_size=3).map("".join)
folders = st.lists(st.sampled_from(["d/", "d.e/", "__notes__/", "./", "f" * 90 + "/"]), max_size=2).map("".join)
extensions = st.sampled_from(["jpg", "JPG", "cls", "png", "v2.jpg", "seg.png", "json", ""])
names = st.one_of(
    st.builds("{}{}.{}".format, folders, st.sampled_from(["a", "b", "img", "x" * 120]), extensions),
    st.builds("{}{}".format, folders, plain),
    st.sampled_from(["__meta__", "__notes__.json", "README", "a/.hidden.jpg", "a.b/.x", "d.e/f/.g"]),
)
members = st.tuples(names, st.one_of(st.none(), st.binary(max_size=700)))


@settings(max_examples=400, deadline=None)
@given(st.lists(members, max_size=12), st.sampled_from(FORMATS), st.integers(1, 3000))
@example([("img.jpg", b"1"), ("img.v2.jpg", b"2"), ("img.cls", b"0")], tarfile.USTAR_FORMAT, 512)
@example([("d", None), ("d/a.jpg", b"1"), ("README", b"x"), ("d/a.cls", b"0"), ("z", None)], tarfile.USTAR_FORMAT, 100)
def test_samples_are_those_of_stock_webdataset(listed, tar_format: int, piece: int) -> None:
    try:
        tar = tar_bytes(listed, tar_format)
    except ValueError:  # a name that USTAR cannot hold
        return
    found = scan(tar, piece)
    assert (found.cut, found.bytes, found.sha256) == ("", len(tar), hashlib.sha256(tar).hexdigest())
    try:
        expected = stock_samples(tar)
    except ValueError:  # "duplicate file name": stock stops the whole shard, we name the sample
        assert found.kinds["a second member of this name in one sample"]
        return
    assert our_samples(tar, found) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(members, max_size=12), st.sampled_from(FORMATS))
def test_ranges_lie_end_to_end_up_to_the_end_mark(listed, tar_format: int) -> None:
    try:
        tar = tar_bytes(listed, tar_format)
    except ValueError:
        return
    found = scan(tar)
    covered = sum(length for length, _ in struct.iter_unpack("<II", found.entries))
    assert not found.samples or not tar[covered:].strip(b"\0")
    assert not found.samples or tar[covered : covered + 1024] == bytes(1024)


def small_tar() -> bytes:
    return tar_bytes(
        [(f"{number}.{ending}", bytes([65 + number]) * 700) for number in range(4) for ending in ("cls", "jpg")]
    )


def test_every_cut_of_a_small_tar_is_detected() -> None:
    tar = small_tar()
    end = 8 * (512 + 1024)
    assert scan(tar).cut == ""
    for length in [*range(0, end + 1024, 512), *range(0, end + 1024, 97)]:
        found = scan(tar[:length])
        assert found.cut, length
        # What is admitted in spite of the cut are whole samples: a cut between members leaves no half sample. Whether a
        # first sample with nothing after it is whole cannot be told.
        whole = 0 if length < 3072 + 512 else min(length // 3072, 4)
        contents = [bytes([65 + number]) * 700 for number in range(whole)]
        expected = [{"__key__": str(number), "cls": data, "jpg": data} for number, data in enumerate(contents)]
        assert our_samples(tar, found) == expected, length
    # Only the padding to whole records is missing: nothing is lost, and many programs never write it.
    for length in range(end + 1024, len(tar), 512):
        assert scan(tar[:length]).cut == ""


def test_stock_webdataset_takes_the_same_cuts_for_whole_archives() -> None:
    """Why the test above matters; if it fails, stock webdataset has become better."""
    tar = small_tar()
    partial = [stock_samples(tar[: number * 1536]) for number in range(1, 8)]
    assert [len(samples[-1]) for samples in partial] == [2, 3, 2, 3, 2, 3, 2]


def test_damaged_header_is_a_cut_and_says_where() -> None:
    tar = bytearray(small_tar())
    tar[6144 + 5] ^= 1  # name of a member of the third sample
    found = scan(bytes(tar))
    reason = "not a tar header (bad checksum); stock readers stop there without a word"
    assert found.cut == f"cannot be read from byte 6,144 on: {reason}"
    assert found.samples == 2
    assert found.sha256 == hashlib.sha256(tar).hexdigest()


@pytest.mark.parametrize(("program", "mode"), [("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz")])
def test_compressed_tar_is_named(program: str, mode: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert scan(file.getvalue()).cut.startswith(f"compressed with {program} in spite of its name")


def test_joined_archives_are_named() -> None:
    first, second = tar_bytes([("a.jpg", b"1")]), tar_bytes([("b.jpg", b"2")])
    found = scan(first + second)
    assert found.samples == 1
    assert found.cut.startswith("bytes after the end mark, from byte 1,536: readers stop there")
    assert len(stock_samples(first + second)) == 1


def test_empty_archive_has_no_samples() -> None:
    found = scan(tar_bytes([]))
    assert (found.samples, found.cut, found.problems) == (0, "", [])
    assert scan(tar_bytes([("folder", None), ("README", b"x")])).samples == 0
    assert scan(b"").cut == "an empty file"


def kinds(*listed: tuple[str, bytes]) -> dict[str, tuple[int, str]]:
    found = scan(tar_bytes(listed))
    return {
        kind: next((p.sample, p.member) for p in found.problems if p.reason.startswith(kind)) for kind in found.kinds
    }


def test_what_is_wrong_with_samples_is_named() -> None:
    image, label = ("a.jpg", b"1"), ("a.cls", b"7\n")
    assert kinds(image, label) == {}
    assert kinds(image) == {"no label": (0, "")}
    assert kinds(label) == {"no image": (0, "")}
    assert kinds(image, label, ("a.png", b"1")) == {"more than one image": (0, "a.png")}
    assert kinds(("a.jpg", b""), label) == {"empty image": (0, "a.jpg")}
    assert kinds(image, ("a.cls", b"dog")) == {"label is no whole number": (0, "a.cls")}
    assert kinds(image, ("a.cls", b"1" * 200)) == {"label is no whole number": (0, "a.cls")}
    assert kinds(image, label, ("a.v2.jpg", b"2")) == {"another image of the same kind": (0, "a.v2.jpg")}
    assert kinds(image, label, ("a.seg.png", b"2")) == {}
    assert kinds(image, label, ("a.JPG", b"2"))["a second member of this name in one sample"] == (0, "a.JPG")


def test_split_samples_and_duplicate_keys_are_told_apart() -> None:
    split = kinds(("a.jpg", b"1"), ("b.jpg", b"1"), ("b.cls", b"1"), ("a.cls", b"1"))
    assert split == {"no label": (0, ""), "no image": (2, ""), "split sample": (2, "")}
    pairs = [(f"{key}.{ending}", b"1") for key in "aba" for ending in ("jpg", "cls")]
    assert kinds(*pairs) == {"duplicate key": (2, "")}


def test_classes_are_counted() -> None:
    found = scan(tar_bytes([(f"{number}.cls", b"%d" % (number % 3)) for number in range(7)]))
    assert dict(found.class_counts) == {0: 3, 1: 2, 2: 2}


def test_many_problems_are_counted_and_some_listed() -> None:
    found = scan(tar_bytes([(f"{number:04d}.txt", b"") for number in range(500)]))
    assert found.kinds["no image"] == 500
    assert len([problem for problem in found.problems if problem.reason.startswith("no image")]) == 100


@pytest.mark.parametrize("major", ["", "1"])
def test_sparse_files_of_pax_are_named(major: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/a.jpg")
        headers = {"GNU.sparse.name": "a.jpg", "GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
        if major:
            headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg",
                       "GNU.sparse.realsize": "9"}  # fmt: skip
        info.pax_headers, info.size = headers, 516
        tar.addfile(info, io.BytesIO(b"1\n0\n4\n".ljust(512, b"\0") + b"data"))
    found = scan(file.getvalue())
    assert found.samples == 0
    assert "a sparse file, whose bytes are not its contents; write the tar again without --sparse" in found.cut
