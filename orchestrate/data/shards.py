"""One shard on disk: a plain WebDataset tar, the same bytes for the same samples, and its sidecar index."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.data.index import SIDECAR_ENTRY, Shard
from orchestrate.data.tar_headers import (
    BLOCK,
    RESERVED_EXTENSIONS,
    extension_size,
    holds_data,
    odd_header,
    padded,
    plain_header,
    split_name,
)


def pack_sample(key: str, members: dict[str, bytes]) -> bytes:
    """Lay out a sample as tar members `<key>.<extension>`, sorted by name, owned by nobody, dated 1970.

    Raises:
        ValueError: the name does not fit a USTAR header (100 bytes, or 255 with a `/` at the right place).
    """
    return b"".join(
        member_header(f"{key}.{extension}", len(data)) + data + bytes(-len(data) % BLOCK)
        for extension, data in sorted(members.items())
    )


def member_header(name: str, size: int) -> bytes:
    """Build the 512 bytes before a member. Raises ValueError for a name that does not fit."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def unpack_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Split the byte range of a sample into its key and its members by extension, as stock webdataset does.

    A range may also hold what stock readers skip: folders, links, members without a key. A repeated extension is an
    error, as it is for them.

    Raises:
        ValueError: the range does not hold whole members of one key.
    """
    key, members = "", dict[str, bytes]()
    for name, contents in _members(data):
        split = split_name(name)
        if split is None:
            continue
        if members and split[0] != key:
            raise ValueError(f"members of two samples in one range: {key}, {split[0]}")
        key, extension = split
        if extension in members or extension in RESERVED_EXTENSIONS:
            raise ValueError(f"{name}: a second member .{extension} in one sample")
        members[extension] = contents
    if not members:
        raise ValueError("a member is cut")
    return key, members


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of each file; what is no file has an empty name."""
    offset = 0
    while offset < len(data):
        name, start, size = _next_member(data, offset)
        offset = start + padded(size)
        if offset > len(data):
            raise ValueError("a member is cut")
        yield name, data[start : start + size]


def _next_member(data: bytes, offset: int) -> tuple[str, int, int]:
    """Find name, start of contents and size of the member whose first header is at `offset`."""
    plain = plain_header(data[offset : offset + BLOCK])
    if plain is not None:
        return plain[0], offset + BLOCK, plain[1]
    end = offset
    while (size := extension_size(data[end : end + BLOCK])) is not None:
        end += BLOCK + size
    end += BLOCK
    info = odd_header(data[offset:end])
    return info.name if info.isreg() else "", end, info.size if holds_data(info) else 0


def load_sidecar(url: str) -> list[tuple[int, int]]:
    """Read a sidecar: length and CRC32 of each sample's range.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it holds a part of an entry.
    """
    return parse_sidecar(storage.read(url))


def parse_sidecar(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Split the bytes of a sidecar; see `load_sidecar`. Raises ValueError."""
    if len(data) % SIDECAR_ENTRY.size:
        raise ValueError(f"{len(data):,} bytes, not {SIDECAR_ENTRY.size} for each sample")
    return list(SIDECAR_ENTRY.iter_unpack(data))


def pack_sidecar(entries: Iterable[tuple[int, int]]) -> bytes:
    """Lay out the bytes of a sidecar: length and CRC32 of each sample's range."""
    return b"".join(SIDECAR_ENTRY.pack(*entry) for entry in entries)


def sidecar_crc(data: bytes | bytearray) -> str:
    """Sum up the bytes of a sidecar, as `Shard.sidecar_crc` holds it."""
    return f"{zlib.crc32(data):08x}"


def read_sample(url: str, sidecar_url: str, number: int) -> tuple[str, dict[str, bytes]]:
    """Read one sample of a shard: key and members. Its checksum is not looked at.

    Raises:
        OSError: shard or sidecar cannot be read.
        ValueError: they do not fit together.
    """
    lengths = [length for length, _ in load_sidecar(sidecar_url)]
    return unpack_sample(storage.read(url, sum(lengths[:number]), lengths[number]))


def write_shard(path: Path, samples: Iterable[bytes]) -> Shard:
    """Write laid-out samples as a tar and its sidecar; both appear under their names only when whole.

    The tar appears last: where it is, its sidecar is. Leaves only `.part` files when `samples` or the disk fails.
    """
    partial, entries = Path(f"{path}.part"), bytearray()
    checksum = hashlib.sha256()
    with partial.open("wb") as file:
        for sample in samples:
            file.write(sample)
            checksum.update(sample)
            entries += SIDECAR_ENTRY.pack(len(sample), zlib.crc32(sample))
        end = _archive_end(file.tell())
        file.write(end)
        checksum.update(end)
        num_bytes = file.tell()
        _sync(file)
    shard = Shard(
        path.name, len(entries) // SIDECAR_ENTRY.size, num_bytes, checksum.hexdigest(), sidecar_crc=sidecar_crc(entries)
    )
    sidecar = path.with_name(shard.sidecar)
    with Path(f"{sidecar}.part").open("wb") as file:
        file.write(entries)
        _sync(file)
    Path(f"{sidecar}.part").replace(sidecar)
    partial.replace(path)
    return shard


def recover_shard(path: Path) -> Shard | None:
    """Describe a shard that an earlier run finished, after checking each byte; None if it is missing or damaged."""
    try:
        data, entries = path.read_bytes(), path.with_name(f"{path.name}.idx").read_bytes()
    except OSError:
        return None
    if len(entries) % SIDECAR_ENTRY.size:
        return None
    offset = 0
    for length, crc in SIDECAR_ENTRY.iter_unpack(entries):
        if zlib.crc32(data[offset : offset + length]) != crc:
            return None
        offset += length
    if data[offset:] != _archive_end(offset):
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(path.name, len(entries) // SIDECAR_ENTRY.size, len(data), sha256, sidecar_crc=sidecar_crc(entries))


def _archive_end(size: int) -> bytes:
    """Two empty blocks end a tar; it is padded to whole records, as tar programs write it."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
