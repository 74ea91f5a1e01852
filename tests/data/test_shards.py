import io
import tarfile
from pathlib import Path

import pytest

from orchestrate.data.shards import member_header, pack_sample, recover_shard, unpack_sample, write_shard
from tests.data.tars import stock_samples, tar_bytes

SAMPLES = [pack_sample(f"a.b/{number}", {"jpg": bytes([number]) * (300 * number), "cls": b"3"}) for number in range(5)]


def test_sample_comes_back_as_it_was_packed() -> None:
    members = {"cls": b"3", "jpg": bytes(range(256)) * 5, "json": b""}
    assert unpack_sample(pack_sample("class.1/é x", members)) == ("class.1/é x", members)
    long_key = f"{'d' * 120}/{'k' * 90}"
    assert unpack_sample(pack_sample(long_key, members)) == (long_key, members)


def test_tar_is_stock_ustar_with_sorted_members_and_no_time() -> None:
    with tarfile.open(fileobj=io.BytesIO(SAMPLES[2] + bytes(1024))) as tar:
        found = [(member.name, member.size, member.mtime, member.uid, member.uname) for member in tar]
    assert found == [("a.b/2.cls", 1, 0, 0, ""), ("a.b/2.jpg", 600, 0, 0, "")]


def test_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="name is too long"):
        pack_sample("k" * 101, {"jpg": b""})


def test_every_cut_of_a_sample_is_refused() -> None:
    for length in range(len(SAMPLES[2])):
        if length != 1024:  # the first member alone is whole; its length is in the index
            with pytest.raises(ValueError, match=r"member is cut|not a tar header"):
                unpack_sample(SAMPLES[2][:length])


def test_two_samples_in_one_range_are_refused() -> None:
    with pytest.raises(ValueError, match="members of two samples"):
        unpack_sample(SAMPLES[1] + SAMPLES[2])


def test_second_member_of_a_name_is_refused() -> None:
    """Stock webdataset stops there too: which of the two is meant cannot be told."""
    for names in (("a.jpg", "a.jpg"), ("a.jpg", "a.JPG"), ("a.jpg", "a.__key__")):
        tar = tar_bytes([(name, b"1") for name in names])
        with pytest.raises(ValueError, match=r"a second member \.(jpg|__key__) in one sample"):
            unpack_sample(tar[:2048])
        with pytest.raises(ValueError, match="duplicate file name"):
            stock_samples(tar)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_range_may_hold_what_other_programs_write(tar_format: int) -> None:
    name = f"d/{'x' * 150}"
    listed = [
        ("d", None),
        (f"{name}.jpg", b"image"),
        ("README", b"text"),
        ("__notes__/a.jpg", b"1"),
        (f"{name}.CLS", b"3"),
    ]
    data = tar_bytes(listed, tar_format).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    assert unpack_sample(data) == (name, {"jpg": b"image", "cls": b"3"})
    for length in range(1, len(data), 64):
        try:
            cut = unpack_sample(data[:length])
        except ValueError:
            continue
        assert length % 512 == 0  # a whole number of members: its length is in the index
        assert cut == (name, {"jpg": b"image"})


def test_sparse_files_and_global_names_are_refused() -> None:
    sparse = bytearray(member_header("a.jpg", 0))
    sparse[156:157] = b"S"
    sparse[148:156] = b"%06o\0 " % (sum(sparse) - sum(sparse[148:156]) + 8 * 32)
    with pytest.raises(ValueError, match=r"not the header of one member|sparse"):
        unpack_sample(bytes(sparse))
    renaming = tarfile.TarInfo.create_pax_global_header({"path": "other.jpg"}) + member_header("a.jpg", 0)
    with pytest.raises(ValueError, match="a global pax header sets path"):
        unpack_sample(renaming)
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "by hand"}) + member_header("a.jpg", 0)
    assert unpack_sample(comment) == ("a", {"jpg": b""})


def test_shard_appears_only_when_whole(tmp_path: Path) -> None:
    def interrupted():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a-000000.tar", interrupted())
    assert recover_shard(tmp_path / "a-000000.tar") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a-000000.tar.part"]


def test_finished_shard_is_recovered_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a-000000.tar"
    shard = write_shard(path, SAMPLES)
    assert recover_shard(path) == shard
    assert (shard.samples, shard.bytes % tarfile.RECORDSIZE) == (5, 0)
    whole = path.read_bytes()
    # Damage in a member, in padding after the last one, a cut, an addition.
    for damaged in (b"x" + whole[1:], whole[:-1] + b"x", whole[:-1], whole + b"\0", b""):
        path.write_bytes(damaged)
        assert recover_shard(path) is None
    path.write_bytes(whole)
    sidecar = tmp_path / shard.sidecar
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    assert recover_shard(path) is None


def test_empty_shard_is_a_tar(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a-000000.tar", [])
    assert shard.samples == 0
    with tarfile.open(tmp_path / "a-000000.tar") as tar:
        assert tar.getnames() == []
