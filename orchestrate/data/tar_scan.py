"""One pass over the bytes of a tar that anybody wrote: its samples, their checksums, and what is wrong with it."""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from orchestrate.data.duplicate_keys import SeenKeys, key_hash
from orchestrate.data.index import SIDECAR_ENTRY
from orchestrate.data.tar_headers import (
    BLOCK,
    RESERVED_EXTENSIONS,
    checksum_holds,
    extension_size,
    holds_data,
    odd_header,
    padded,
    plain_header,
    split_name,
)
from orchestrate.data.tar_problems import (
    BAD_LABEL,
    LABEL_EXTENSION,
    NO_LABEL,
    UNPACK,
    UNUSABLE,
    Problem,
    content_problems,
    label_number,
)

_LARGEST_RANGE = (1 << 32) - 1
_LONGEST_LABEL = 64
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A broken shard may have a problem in each sample; more than these are counted, not listed.
_LISTED_PER_KIND = 100


@dataclass(slots=True)
class Scan:
    """What a tar holds.

    `entries` is its sidecar; `keys` are 64-bit hashes of the samples' keys. `cut` says why the end of the archive was
    not reached, "" if it was and nothing follows it: samples before that place are whole, those after it are unknown.
    `unusable` counts samples that training cannot use, `unlabelled` those that lack but a label for it.
    """

    name: str
    entries: bytearray = field(default_factory=bytearray)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    class_counts: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    unusable: int = 0
    unlabelled: int = 0
    cut: str = ""
    bytes: int = 0
    sha256: str = ""

    @property
    def samples(self) -> int:
        """Count the samples."""
        return len(self.keys)

    def note(self, kind: str, sample: int, key: str, member: str, detail: str = "") -> None:
        """Count a problem, and list it unless there are too many of its kind."""
        self.kinds[kind] += 1
        if self.kinds[kind] <= _LISTED_PER_KIND:
            self.problems.append(Problem(self.name, sample, key, member, f"{kind}{detail}"))


def scan_tar(name: str, pieces: Iterable[bytes], each: Callable[[ScannedSample], object] | None = None) -> Scan:
    """Find the samples of a tar as stock webdataset groups them, in one pass.

    The samples' ranges lie end to end from byte 0. What readers skip (folders, links, members without a key, notes) and
    extension headers belong to the sample that follows, or to the one around them; after the last sample, to that one.
    A sample that the end of the file cuts is left out, and so is the last one before a cut if it has not the members
    that the sample before it has: members may be missing. Damage never raises: it is in the result.

    Args:
        name: of the shard, for messages.
        pieces: its bytes in order.
        each: called with each sample that is admitted.
    """
    return _Scanner(name, _Tape(iter(pieces)), each or (lambda sample: None)).run()


class _CutError(Exception):
    """The tar ends, or cannot be understood, before its end mark."""


class _Tape:
    """Bytes in order, hashed as they pass.

    `crc` runs over the bytes since it was set; so does `fresh`, unless it is None.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece, self._used = pieces, memoryview(b""), 0
        self._sha256 = hashlib.sha256()
        self.offset, self.crc = 0, 0
        self.fresh: int | None = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; fewer where the file ends."""
        parts = list(self._parts(count))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def skip(self, count: int) -> int:
        """Pass over bytes and count them; fewer where the file ends."""
        return sum(map(len, self._parts(count)))

    def rest_is_empty(self) -> bool:
        """Pass over all that is left; say whether all of it is zeros."""
        empty = True
        while data := self.take(1 << 20):
            empty = empty and data.count(0) == len(data)
        return empty

    def sha256(self) -> str:
        """Pass over all that is left; return the checksum of the whole file."""
        while self.skip(1 << 30):
            pass
        return self._sha256.hexdigest()

    def _parts(self, count: int) -> Iterator[memoryview]:
        while count and (self._used < len(self._piece) or self._load()):
            part = self._piece[self._used : self._used + count]
            self._used += len(part)
            self.offset += len(part)
            count -= len(part)
            self.crc = zlib.crc32(part, self.crc)
            if self.fresh is not None:
                self.fresh = zlib.crc32(part, self.fresh)
            yield part

    def _load(self) -> bool:
        for piece in self._pieces:
            if piece:
                self._piece, self._used = memoryview(piece), 0
                self._sha256.update(piece)
                return True
        return False


@dataclass(slots=True)
class ScannedSample:
    """The sample being read; `end` and `crc` are those of its bytes up to its last member so far."""

    key: str
    start: int
    end: int = 0
    crc: int = 0
    extensions: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    label: bytes | None = None
    has_repeated_member: bool = False


class _Scanner:
    """Walks a tape member by member.

    Whether bytes after a sample's last member are its own is known when the next key is: until then the tape keeps two
    checksums, that of the sample with them (`crc`) and that of them alone (`fresh`).
    """

    def __init__(self, name: str, tape: _Tape, each: Callable[[ScannedSample], object]) -> None:
        self._scan, self._tape, self._each = Scan(name), tape, each
        self._sample: ScannedSample | None = None
        self._pending_start = 0
        self._seen = SeenKeys()
        self._last: frozenset[str] | None = None
        self._after_end = ""

    def run(self) -> Scan:
        """Read to the end."""
        scan, tape = self._scan, self._tape
        try:
            while self._member():
                pass
        except _CutError as error:
            scan.cut = str(error)
        self._close_sample()
        scan.cut = scan.cut or self._after_end
        scan.sha256, scan.bytes = tape.sha256(), tape.offset
        return scan

    def _member(self) -> bool:
        """Read the next member; say whether there was one before the end mark."""
        offset, crc = self._tape.offset, self._tape.crc
        found = self._header(offset)
        if found is None:
            if self._sample is not None:  # what comes after the last sample is its own
                self._sample.end, self._sample.crc = offset, crc
            self._end_mark()
            return False
        name, size = found
        split = split_name(name)
        if split is not None:
            self._enter(*split, name)
            self._tape.fresh = None
        self._contents(name, size, split)
        if split is not None and self._sample is not None:
            self._sample.end, self._sample.crc = self._tape.offset, self._tape.crc
            self._pending_start, self._tape.fresh = self._tape.offset, 0
        return True

    def _header(self, offset: int) -> tuple[str, int] | None:
        """Read all headers of a member: its name, "" for what is no file, and bytes of contents; None at the end."""
        header = self._tape.take(BLOCK)
        if len(header) < BLOCK:
            raise _CutError(_cut_reason(offset, header))
        if header.count(0) == BLOCK:
            return None
        plain = plain_header(header)
        if plain is not None and checksum_holds(header):
            return plain
        blocks = header
        try:
            while (size := extension_size(header)) is not None:
                header = self._tape.take(size + BLOCK)
                blocks += header
                header = header[size:]
            info = odd_header(blocks)
        except ValueError as error:
            raise _CutError(_damage_reason(offset, blocks, error)) from None
        return info.name if info.isreg() else "", info.size if holds_data(info) else 0

    def _enter(self, key: str, extension: str, member: str) -> None:
        """Begin a sample if the key is new, and add a member to it."""
        if self._sample is None or self._sample.key != key:
            self._close_sample()
            if self._tape.fresh is not None:
                self._tape.crc = self._tape.fresh
            self._sample = ScannedSample(key, self._pending_start)
        if extension in self._sample.extensions or extension in RESERVED_EXTENSIONS:
            self._sample.has_repeated_member = True
            self._scan.note("a second member of this name in one sample", self._scan.samples, key, member)
        self._sample.extensions.append(extension)

    def _contents(self, name: str, size: int, split: tuple[str, str] | None) -> None:
        """Pass over the contents of a member, keeping a label."""
        sample, is_label = self._sample, split is not None and split[1] == LABEL_EXTENSION
        label = self._tape.take(size) if is_label and size <= _LONGEST_LABEL else b""
        wanted = padded(size) - len(label)
        if self._tape.skip(wanted) < wanted:
            if split is not None:
                self._sample = None
            raise _CutError(f"cut at byte {self._tape.offset:,}, within member {name!r}")
        if sample is None or split is None:
            return
        if self._tape.offset - sample.start > _LARGEST_RANGE:
            self._sample = None
            raise _CutError(
                f"sample with key {sample.key!r} at byte {sample.start:,}: over 4 GiB, the most an index holds"
            )
        if is_label:
            sample.label = label
        if not size:
            sample.empty.append(split[1])

    def _end_mark(self) -> None:
        """Check the second of the two empty blocks that end a tar, and that nothing follows."""
        start = self._tape.offset
        block = self._tape.take(BLOCK)
        if len(block) < BLOCK:
            raise _CutError(
                f"cut at byte {self._tape.offset:,}: the second of the two empty blocks at its end is missing"
            )
        if not self._tape.rest_is_empty() or block.count(0) < BLOCK:
            self._after_end = (
                f"bytes after the end mark, from byte {start:,}: readers stop there, so what follows is lost; were "
                "archives joined? Take them apart (`tar --ignore-zeros -xf` finds all) and write one tar of them"
            )

    def _close_sample(self) -> None:
        """Add the sample to the index, unless the tar is cut and members of it may be missing."""
        sample, scan = self._sample, self._scan
        self._sample = None
        if sample is None:
            return
        extensions = frozenset(sample.extensions)
        if scan.cut and extensions != self._last:
            return
        self._last = extensions
        scan.entries += SIDECAR_ENTRY.pack(sample.end - sample.start, sample.crc)
        _note_contents(scan, sample)
        hashed = key_hash(sample.key)
        kind, detail = self._seen.meet(hashed, extensions)
        if kind:
            scan.note(kind, scan.samples, sample.key, "", detail)
        scan.keys.append(hashed)
        self._each(sample)


def _note_contents(scan: Scan, sample: ScannedSample) -> None:
    """Note what training could not use in a sample; whether images can be decoded is not looked at."""
    number, key = scan.samples, sample.key
    kinds = set[str]()
    for kind, member, detail in content_problems(key, sample.extensions, sample.empty, sample.label):
        scan.note(kind, number, key, member, detail)
        kinds.add(kind)
    if sample.has_repeated_member or kinds & UNUSABLE:
        scan.unusable += 1
    elif kinds & {NO_LABEL, BAD_LABEL}:
        scan.unlabelled += 1
    label = label_number(sample.label) if sample.label is not None else None
    if label is not None:
        scan.class_counts[label] += 1


def _cut_reason(offset: int, rest: bytes) -> str:
    if not offset and not rest:
        return "an empty file"
    place = f"cut at byte {offset + len(rest):,}: no end mark; its writer was killed, or a copy stopped"
    return _compression(offset, rest) or place


def _damage_reason(offset: int, blocks: bytes, error: ValueError) -> str:
    return _compression(offset, blocks) or f"cannot be read from byte {offset:,} on: {error}"


def _compression(offset: int, blocks: bytes) -> str:
    program = next((name for magic, name in _COMPRESSED.items() if not offset and blocks.startswith(magic)), "")
    return program and f"compressed with {program} in spite of its name; {UNPACK}"
