"""Compare one shard with its index: by a few bytes, or by all of them."""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from orchestrate.data import storage
from orchestrate.data.duplicate_keys import SeenKeys, key_hash
from orchestrate.data.images import check_image
from orchestrate.data.index import SIDECAR_ENTRY, Manifest, Shard
from orchestrate.data.shards import parse_sidecar, sidecar_crc, unpack_sample
from orchestrate.data.tar_headers import BLOCK, plain_header, split_name
from orchestrate.data.tar_problems import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    NO_LABEL,
    Problem,
    content_problems,
    label_number,
)
from orchestrate.errors import StorageError

Entries = Sequence[tuple[int, int]]
_CHANGED = "changed since it was indexed"
_END_MARK_BYTES = 2 * BLOCK
_LISTED_PER_SHARD = 1000


@dataclass(frozen=True)
class ShardFiles:
    """A shard of a dataset and what its manifest says about it."""

    shard: Shard
    url: str
    sidecar_url: str
    num_classes: int
    is_cut: bool

    @classmethod
    def of(cls, url: str, manifest: Manifest, shard: Shard) -> ShardFiles:
        """Find the files of a shard, of the dataset whose manifest lies at `url`."""
        cut = shard.name in manifest.info.get("cut", ())
        urls = manifest.shard_url(url, shard), manifest.sidecar_url(url, shard)
        return cls(shard, *urls, manifest.num_classes, cut)

    def problem(self, reason: str, *, sample: int = -1, key: str = "", member: str = "") -> Problem:
        """Say what is wrong with the shard, or with a sample of it."""
        return Problem(self.shard.name, sample, key, member, reason)


@dataclass
class Walk:
    """What all bytes of a shard say; `keys` are hashes of the samples' keys, of an unknown key a stand-in."""

    problems: list[Problem] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    sha256: str = ""


def check_file(files: ShardFiles) -> list[Problem]:
    """Check by its size and version that a shard is the one that was indexed; reads none of it.

    Raises:
        StorageError: the store did not answer.
    """
    shard = files.shard
    try:
        found = storage.info(files.url)
    except FileNotFoundError:
        return [files.problem("missing; copy it again, or index without it")]
    except StorageError:
        raise
    except OSError as error:
        return [files.problem(f"cannot be looked at: {error.strerror or error}")]
    if found.size != shard.bytes:
        what = "cut" if found.size < shard.bytes else "changed since it was indexed"
        return [
            files.problem(f"{found.size:,} bytes, should be {shard.bytes:,}: {what}; copy it again, or index again")
        ]
    if storage.versions_differ(found.version, shard.version):
        versions = f"version {found.version}, was {shard.version}"
        fix = "--full tells whether its contents did, and --full --repair records the new version if not"
        return [files.problem(f"{_CHANGED}: {versions}; {fix}")]
    return []


def is_changed(problem: Problem) -> bool:
    """Say whether a problem is that a shard has another version: its contents may be the same."""
    return problem.reason.startswith(_CHANGED)


def read_entries(files: ShardFiles) -> tuple[Entries | None, list[Problem]]:
    """Read a sidecar and check that it fits the shard; None if it is of no use.

    Raises:
        StorageError: the store did not answer.
    """
    shard, name = files.shard, files.shard.sidecar
    try:
        data = storage.read(files.sidecar_url)
        entries = parse_sidecar(data)
    except StorageError:
        raise
    except FileNotFoundError:
        return None, [files.problem(f"its index {name} is missing; --repair makes it again")]
    except (OSError, ValueError) as error:
        return None, [files.problem(f"its index {name} cannot be read: {error}; --repair makes it again")]
    if len(entries) != shard.samples:
        wanted = shard.samples * SIDECAR_ENTRY.size
        reason = f"{len(entries) * SIDECAR_ENTRY.size:,} bytes, should be {wanted:,}"
    elif sum(length for length, _ in entries) > shard.bytes:
        reason = "its samples are longer than the shard"
    elif shard.sidecar_crc not in ("", sidecar_crc(data)):
        reason = f"CRC32 is {sidecar_crc(data)}, the manifest says {shard.sidecar_crc}"
    else:
        return entries, []
    return None, [files.problem(f"its index {name} is damaged: {reason}; --repair makes it again")]


def check_end(files: ShardFiles, entries: Entries) -> list[Problem]:
    """Check that the two empty blocks that end a tar lie where the index ends.

    Raises:
        StorageError: the store did not answer.
    """
    if files.is_cut:
        return []
    end = sum(length for length, _ in entries)
    try:
        found = storage.read(files.url, end, _END_MARK_BYTES)
    except StorageError:
        raise
    except OSError as error:
        return [files.problem(f"cannot be read: {error.strerror or error}")]
    return [] if found == bytes(_END_MARK_BYTES) else [files.problem(_no_end(end))]


def walk(files: ShardFiles, entries: Entries, pieces: Iterable[bytes], *, decode: bool) -> Walk:
    """Check every sample of a shard against its index, and the rest of its bytes.

    Args:
        files: the shard.
        entries: length and CRC32 of each sample.
        pieces: the shard's bytes.
        decode: also decode every image, strictly.
    """
    result, tape = Walk(), _Tape(pieces)
    for problem in _sample_problems(files, entries, tape, result.keys, decode):
        if len(result.problems) < _LISTED_PER_SHARD:
            result.problems.append(problem)
    if len(result.problems) == _LISTED_PER_SHARD:
        result.problems.append(files.problem("a thousand problems or more; the others are not listed"))
    end, rest_is_empty, num_rest = tape.offset, True, 0
    while piece := tape.take(1 << 20):
        num_rest += len(piece)
        rest_is_empty = rest_is_empty and piece.count(0) == len(piece)
    if not files.is_cut and num_rest < _END_MARK_BYTES:
        result.problems.append(files.problem(_no_end(end)))
    elif not files.is_cut and not rest_is_empty:
        reason = f"bytes after its last sample, from byte {end:,}, are not zeros"
        result.problems.append(files.problem(f"{reason}: samples that readers never see, or damage; index again"))
    result.sha256 = tape.sha256.hexdigest()
    return result


def _sample_problems(
    files: ShardFiles, entries: Entries, tape: _Tape, keys: array[int], decode: bool
) -> Iterator[Problem]:
    seen, last = SeenKeys(), ""
    for number, (length, crc) in enumerate(entries):
        data = tape.take(length)
        keys.append(key_hash(f"\n{files.shard.name}\n{number}"))  # until its own is known
        if len(data) < length:
            yield files.problem(
                f"the shard ends within it, at byte {tape.offset:,}", sample=number, key=_key_hint(data)
            )
            return
        found = zlib.crc32(data)
        if found != crc:
            yield _damage(files, number, data, f"CRC32 is {found:08x}, the index says {crc:08x}: damaged")
            continue
        try:
            key, members = unpack_sample(data)
        except ValueError as error:
            yield files.problem(f"not laid out as a sample: {error}", sample=number, key=_key_hint(data))
            continue
        keys[-1] = key_hash(key)
        kind, detail = seen.meet(keys[-1], members)
        if key == last:
            yield files.problem("its members are in two samples of the index; index again", sample=number, key=key)
        elif kind:
            yield files.problem(kind + detail, sample=number, key=key)
        last = key
        for member, reason in _member_problems(key, members, files.num_classes, decode):
            yield files.problem(reason, sample=number, key=key, member=member)


def _member_problems(key: str, members: dict[str, bytes], num_classes: int, decode: bool) -> Iterator[tuple[str, str]]:
    empty, label = [extension for extension, data in members.items() if not data], members.get(LABEL_EXTENSION)
    for kind, member, detail in content_problems(key, members, empty, label):
        if num_classes or kind != NO_LABEL:
            yield member, kind + detail
    class_number = label_number(label) if label else None
    if class_number is not None and class_number >= num_classes:
        yield f"{key}.{LABEL_EXTENSION}", f"label {class_number}, classes are 0 to {num_classes - 1}"
    for extension in sorted(IMAGE_EXTENSIONS & members.keys() if decode else ()):
        reason = check_image(members[extension]) if members[extension] else None
        if reason is not None:
            yield f"{key}.{extension}", reason


def _damage(files: ShardFiles, number: int, data: bytes, reason: str) -> Problem:
    """Name the member that is damaged, where it can be told: most decoders accept most damage."""
    try:
        key, members = unpack_sample(data)
    except ValueError as error:
        return files.problem(f"{reason}: {error}", sample=number, key=_key_hint(data))
    images = sorted(IMAGE_EXTENSIONS & members.keys())
    broken = next((f"{key}.{extension}" for extension in images if check_image(members[extension])), "")
    return files.problem(reason, sample=number, key=key, member=broken)


def _key_hint(data: bytes) -> str:
    """Guess the key of a damaged sample: most damage spares the header."""
    plain = plain_header(data[:BLOCK])
    return (split_name(plain[0]) or ("", ""))[0] if plain else ""


def _no_end(end: int) -> str:
    return f"no end mark at byte {end:,}, where its index ends: cut or damaged; copy it again, or index again"


class _Tape:
    """Bytes in order, hashed as they pass."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._left = iter(pieces), memoryview(b"")
        self.sha256, self.offset = hashlib.sha256(), 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; fewer where the file ends."""
        parts: list[memoryview] = []
        while count and (self._left or self._load()):
            parts.append(self._left[:count])
            self._left = self._left[count:]
            count -= len(parts[-1])
            self.offset += len(parts[-1])
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _load(self) -> bool:
        for piece in self._pieces:
            if piece:
                self.sha256.update(piece)
                self._left = memoryview(piece)
                return True
        return False
