"""One shard on disk: a plain WebDataset tar, the same bytes for the same samples, and its sidecar index."""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrate.data.index import SIDECAR_BYTES_PER_SAMPLE, Shard

_BLOCK = 512
_ENTRY = struct.Struct("<II")
assert _ENTRY.size == SIDECAR_BYTES_PER_SAMPLE


def pack_sample(key: str, members: dict[str, bytes]) -> bytes:
    """Lay out a sample as tar members `<key>.<extension>`, sorted by name, owned by nobody, dated 1970.

    Raises:
        ValueError: the name does not fit a USTAR header (100 bytes, or 255 with a `/` at the right place).
    """
    return b"".join(
        member_header(f"{key}.{extension}", len(data)) + data + bytes(-len(data) % _BLOCK)
        for extension, data in sorted(members.items())
    )


def member_header(name: str, size: int) -> bytes:
    """Build the 512 bytes before a member. Raises ValueError for a name that does not fit."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def unpack_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Split the byte range of a sample into its key and its members by extension.

    The key ends at the first dot of the base name, as in stock webdataset.

    Raises:
        ValueError: the range does not hold whole members of one key.
    """
    key, members, offset = "", dict[str, bytes](), 0
    while offset < len(data):
        name, size = _parse_header(data[offset : offset + _BLOCK])
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        found = folder + slash + stem
        if members and found != key:
            raise ValueError(f"members of two samples in one range: {key}, {found}")
        key, start = found, offset + _BLOCK
        members[extension.lower()] = data[start : start + size]
        offset = start + size + -size % _BLOCK
    if offset != len(data) or not members:
        raise ValueError("a member is cut")
    return key, members


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
            entries += _ENTRY.pack(len(sample), zlib.crc32(sample))
        end = _archive_end(file.tell())
        file.write(end)
        checksum.update(end)
        num_bytes = file.tell()
        _sync(file)
    shard = Shard(path.name, len(entries) // _ENTRY.size, num_bytes, checksum.hexdigest())
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
    if len(entries) % _ENTRY.size:
        return None
    offset = 0
    for length, crc in _ENTRY.iter_unpack(entries):
        if zlib.crc32(data[offset : offset + length]) != crc:
            return None
        offset += length
    if data[offset:] != _archive_end(offset):
        return None
    return Shard(path.name, len(entries) // _ENTRY.size, len(data), hashlib.sha256(data).hexdigest())


def _archive_end(size: int) -> bytes:
    """Two empty blocks end a tar; it is padded to whole records, as tar programs write it."""
    return bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % tarfile.RECORDSIZE)


def _parse_header(header: bytes) -> tuple[str, int]:
    """Read name and size from a USTAR header; `tarfile` takes ten times as long."""
    if len(header) < _BLOCK or header[156:157] not in (b"0", b"\0"):
        raise ValueError("not the header of a plain file")
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    full = prefix + b"/" + name if prefix else name
    return full.decode("utf-8", "surrogateescape"), int(header[124:136].strip(b" \0"), 8)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
