"""WebDataset tars as a source to pack: those of others, cut anew, shuffled and indexed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from operator import xor
from pathlib import Path
from typing import Any, NamedTuple

from orchestrate.data import storage
from orchestrate.data.class_names import are_names, known_classes, label_problem, numbered
from orchestrate.data.images import SUFFIXES
from orchestrate.data.index_records import FOLDER as RECORDS_FOLDER
from orchestrate.data.pack_sources import Item, Source, class_order, key_problems, problems_error, relabel
from orchestrate.data.shards import member_header, unpack_sample
from orchestrate.data.storage import TAR_SUFFIX
from orchestrate.data.tar_problems import (
    IMAGE_EXTENSIONS,
    MOST_CLASSES,
    NO_LABEL,
    content_problems,
    counted,
    label_number,
)
from orchestrate.data.tar_scan import ScannedSample, scan_tar
from orchestrate.errors import DataError, StorageError

_SURELY_FITS = 25  # characters: a header holds 100 bytes, and UTF-8 takes four at most
_MODULES = {"gz": gzip, "tgz": gzip, "bz2": bz2, "tbz2": bz2, "xz": lzma, "txz": lzma}
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Part(NamedTuple):
    """A byte range of a tar, and its CRC32."""

    start: int
    length: int
    crc: int


@dataclass
class _Sample:
    """A sample to pack; its members may lie in several places of one tar."""

    tar: str
    key: str
    extensions: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    label: bytes | None = None
    parts: list[Part] = field(default_factory=list)
    has_repeated_member: bool = False


@dataclass
class _Listing:
    """What was found so far: samples, what is wrong with those that cannot be packed, and what is wrong with tars."""

    items: list[Item] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def holds_tars(source: str) -> bool:
    """Say whether a source is tars: another store, a pattern, a tar, or a folder of them without images or folders."""
    path = storage.local_path(source)
    if path is None or storage.base_folder(source) != source:
        return True
    if not path.is_dir() or not storage.list_tars(source):
        return False
    others = (entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name != RECORDS_FOLDER)
    return not any(entry.is_dir() or entry.suffix.lower() in SUFFIXES for entry in others)


def tar_source(
    url: str, *, classes: Sequence[str] | None, scratch: Callable[[], Path], skip_bad: bool = False
) -> Source:
    """List the samples of tars, reading each tar once. Samples that are split within a tar are put together.

    Args:
        url: folder of tars, one tar, or a pattern; compressed ones too.
        classes: classes to number anew by their names, where a manifest beside the tars has names; else names in order
            of the labels. By default the classes of that manifest, or the numbers.
        scratch: makes a local folder for what compressed tars unpack to; called only if there are some.
        skip_bad: leave out samples that cannot be packed, and count them.

    Raises:
        DataError: lists all that is wrong, first of all that there are no tars.
        StorageError: a store did not answer.
    """
    base, found = storage.base_folder(url), _Listing()
    folder: Path | None = None
    for number, name in enumerate(_names(url)):
        tar_url = storage.join(base, name)
        if not name.endswith(TAR_SUFFIX):
            folder = folder or scratch()
            tar_url = str(_decompress(tar_url, folder / f"{number:06d}.tar", found.problems) or "")
        if tar_url:
            _list_tar(tar_url, name, found)
    items = _packable(found)
    if not items and not found.problems and not found.bad:
        found.problems.append("its tars hold no samples")
    known = known_classes(base)
    by_name = classes is not None and are_names(known)
    names = _class_names(items, known if by_name or classes is None else classes, classes, by_name, found.problems)
    if found.problems:
        raise problems_error(url, found.problems + found.bad)
    if found.bad and not (skip_bad and items):
        hint = "they can be left out with --skip-bad" if items else "all of them"
        raise problems_error(f"{url}: samples that cannot be packed ({hint})", found.bad)
    items = [replace(item, class_name=names[int(item.class_name)]) if names else item for item in items]
    source = Source(items, names, _read_image, _read_members, len(found.bad))
    if classes is None or not by_name:
        return source
    return relabel(replace(source, classes=class_order({item.class_name for item in items} - {""})), classes)


def _packable(found: _Listing) -> list[Item]:
    """Leave out what only shows in the whole: keys that occur twice, samples without the label that others have."""
    is_labelled = any(item.class_name for item in found.items)
    problems = dict(key_problems(found.items, [item.where for item in found.items]))
    items = []
    for number, item in enumerate(found.items):
        if number in problems:
            found.bad.append(problems[number])
        elif is_labelled and not item.class_name:
            found.bad.append(f"{item.where}: key {item.key!r}: {NO_LABEL}")
        else:
            items.append(item)
    return items


def _names(url: str) -> list[str]:
    try:
        names = storage.list_tars(url)
    except StorageError:
        raise
    except (OSError, NotImplementedError) as error:  # fsspec's stores that cannot list raise the latter
        raise DataError(f"{url}: cannot be listed: {error}; give a folder of tars, one, or a pattern") from error
    if not names:
        raise DataError(f"{url}: no tars; give a folder of them, one, or a pattern")
    return names


def _list_tar(url: str, name: str, found: _Listing) -> None:
    samples: dict[str, list[_Sample]] = {}
    start = 0

    def add(scanned: ScannedSample) -> None:
        nonlocal start
        part = Part(start, scanned.end - scanned.start, scanned.crc)
        start += part.length
        earlier = samples.setdefault(scanned.key, [])
        if not earlier or not set(earlier[0].extensions).isdisjoint(scanned.extensions):
            earlier.append(_Sample(name, scanned.key))  # a second of the key, to be named
        sample = earlier[-1] if len(earlier) > 1 else earlier[0]
        sample.extensions += scanned.extensions
        sample.empty += scanned.empty
        sample.parts.append(part)
        sample.label = sample.label if scanned.label is None else scanned.label
        sample.has_repeated_member |= scanned.has_repeated_member

    try:
        scan = scan_tar(name, storage.stream(url), add)
    except StorageError:
        raise
    except OSError as error:
        found.problems.append(f"{url}: cannot be read: {error.strerror or error}")
        return
    if scan.cut:
        found.problems.append(f"{name}: {scan.cut}")
    for sample in chain.from_iterable(samples.values()):
        wrong = next(_sample_problems(sample), "")
        if wrong:
            found.bad.append(f"{name}: key {sample.key!r}: {wrong}")
        else:
            found.items.append(_item(url, sample))


def _sample_problems(sample: _Sample) -> Iterator[str]:
    """Say why a sample cannot be packed, or would not be what it seems."""
    if sample.has_repeated_member:
        yield "a second member of this name in one sample"
    for kind, member, detail in content_problems(sample.key, sample.extensions, sample.empty, sample.label):
        if kind != NO_LABEL:
            yield f"member {member!r}: {kind}{detail}" if member else f"{kind}{detail}"
    if (label := label_number(sample.label or b"")) is not None and label >= MOST_CLASSES:
        yield f"a label {label}: too large for the number of a class; number the classes from 0"
    if not all(_fits(f"{sample.key}.{extension}") for extension in sample.extensions):
        yield "a name too long for a tar; shorten it to 90 bytes"


def _item(url: str, sample: _Sample) -> Item:
    image = next(extension for extension in sample.extensions if extension in IMAGE_EXTENSIONS)
    label = label_number(sample.label or b"")
    parts = ",".join(f"{part.start}+{part.length}" for part in sample.parts)
    length, crc = sum(part.length for part in sample.parts), reduce(xor, (part.crc for part in sample.parts))
    return Item(sample.key, image, f"{url}@{parts}", "" if label is None else str(label), length, crc)


def _fits(name: str) -> bool:
    if len(name) < _SURELY_FITS:
        return True
    try:
        return bool(member_header(name, 0))
    except ValueError:
        return False


def _decompress(url: str, target: Path, problems: list[str]) -> Path | None:
    """Unpack a compressed tar into a plain one: samples are read from it in any order."""
    module = _MODULES.get(url.rpartition(".")[2])
    if module is None:
        problems.append(f"{url}: gzip, bzip2 and xz are read here, this is not; decompress it")
        return None
    try:
        with module.open(io.BufferedReader(_Pieces(storage.stream(url)))) as tar, target.open("wb") as file:
            shutil.copyfileobj(tar, file, 1 << 20)
    except StorageError:
        raise
    except _DECOMPRESSION_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{error.filename or target}: {error.strerror}; free space, or use another disk") from error
        problems.append(f"{url}: cannot be decompressed: {error}; copy it again")
        return None
    return target


class _Pieces(io.RawIOBase):
    """A file that is read once, piece by piece."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._pieces, b"")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _class_names(
    items: Sequence[Item], names: Sequence[str], given: Sequence[str] | None, by_name: bool, problems: list[str]
) -> tuple[str, ...]:
    """Name each label: by the manifest of the tars, by what is given, or by its number."""
    largest = max((int(item.class_name) for item in items if item.class_name), default=-1)
    if largest < 0:
        return ()
    problem = "" if by_name else label_problem(largest, given)
    if by_name and len(names) <= largest:
        problem = f"labels go up to {largest}, the manifest beside the tars names {counted(len(names), 'class')}"
    if problem:
        problems.append(problem)
        return ()
    return tuple(names) if len(names) > largest else numbered(largest + 1)


def _read_members(item: Item) -> dict[str, bytes]:
    url, _, spans = item.where.rpartition("@")
    members, crc = dict[str, bytes](), 0
    for span in spans.split(","):
        start, length = map(int, span.split("+"))
        data = storage.read(url, start, length)
        crc ^= zlib.crc32(data)
        members |= unpack_sample(data)[1] if len(data) == length else {}
    if crc != item.version:
        raise OSError("changed since it was listed; run again")
    return members


def _read_image(item: Item) -> bytes:
    return _read_members(item)[item.extension]
