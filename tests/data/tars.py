"""Tars as other programs write them, and what stock webdataset makes of them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander


def tar_bytes(members: Iterable[tuple[str, bytes | None]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Write members in order; contents of None make a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format, encoding="utf-8") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            if contents is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents or b""))
    return file.getvalue()


def stock_samples(tar: bytes) -> list[dict[str, Any]]:
    """Group the members of a tar as stock webdataset does; without what it adds."""
    source = [{"url": "x", "stream": io.BytesIO(tar)}]
    samples = group_by_keys(tar_file_expander(source))
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]


def write_tar(path: Path, members: Iterable[tuple[str, bytes | None]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, tar_format))
    return path


def members(shard: int, num_samples: int) -> list[tuple[str, bytes]]:
    return [(f"{shard}-{number}.{ending}", contents) for number in range(num_samples)
            for ending, contents in (("jpg", b"image"), ("cls", b"%d" % (number % 3)))]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 5, 0 and 4 samples, as GNU tar, pax and USTAR."""
    folder = tmp_path / "shards"
    for name, num_samples, tar_format in (("a.tar", 5, tarfile.GNU_FORMAT), ("b.tar", 0, tarfile.PAX_FORMAT),
                                          ("c.tar", 4, tarfile.USTAR_FORMAT)):  # fmt: skip
        write_tar(folder / name, members(ord(name[0]), num_samples), tar_format)
    return folder
