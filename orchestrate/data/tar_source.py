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
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.data.images import SUFFIXES
from orchestrate.data.index import load_manifest
from orchestrate.data.index_records import FOLDER as RECORDS_FOLDER
from orchestrate.data.problems import IMAGE_EXTENSIONS, MOST_CLASSES, NO_LABEL, label_number
from orchestrate.data.shards import member_header, unpack_sample
from orchestrate.data.sources import Item, Source, key_problems, problems_error
from orchestrate.data.storage import TAR_SUFFIX
from orchestrate.data.tar_scan import ScannedSample, scan_tar
from orchestrate.errors import DataError, StorageError

_SURELY_FITS = 25  # characters: a header holds 100 bytes, and UTF-8 takes four at most
_MODULES = {"gz": gzip, "tgz": gzip, "bz2": bz2, "tbz2": bz2, "xz": lzma, "txz": lzma}
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass
class _Listing:
    """What was found so far; the class of an item is its label, as text."""

    items: list[Item] = field(default_factory=list)
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


def tar_source(url: str, *, classes: Sequence[str] | None, scratch: Callable[[], Path]) -> Source:
    """List the samples of tars, reading each tar once.

    Args:
        url: folder of tars, one tar, or a pattern; compressed ones too.
        classes: names in order of the labels, by default those of the manifest beside the tars, or the numbers.
        scratch: makes a local folder for what compressed tars unpack to; called only if there are some.

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
    labelled = [item for item in found.items if item.class_name]
    if labelled and len(labelled) < len(found.items):
        found.problems += [f"{item.where}: key {item.key!r}: no label" for item in found.items if not item.class_name]
    found.problems += key_problems(found.items, [item.where for item in found.items])
    if not found.items and not found.problems:
        found.problems.append("its tars hold no samples")
    names = _class_names(base, max((int(item.class_name) for item in labelled), default=-1), classes, found.problems)
    if found.problems:
        raise problems_error(url, found.problems)
    items = [replace(item, class_name=names[int(item.class_name)]) if names else item for item in found.items]
    return Source(items, names, _read_image, _read_members)


def _names(url: str) -> list[str]:
    try:
        names = storage.list_tars(url)
    except StorageError:
        raise
    except (OSError, NotImplementedError) as error:
        raise DataError(f"{url}: cannot be listed: {error}; give a folder of tars, one, or a pattern") from error
    if not names:
        raise DataError(f"{url}: no tars; give a folder of them, one, or a pattern")
    return names


def _list_tar(url: str, name: str, found: _Listing) -> None:
    start = 0

    def add(sample: ScannedSample) -> None:
        nonlocal start
        length, images = sample.end - sample.start, sorted(IMAGE_EXTENSIONS.intersection(sample.extensions))
        where, start = f"{url}@{start}+{length}", start + length
        label = label_number(sample.label) if sample.label else None
        if len(images) == 1:  # the scan names the others
            text = "" if label is None else str(label)
            found.items.append(Item(sample.key, images[0], where, text, length, sample.crc))
        if any(not _fits(f"{sample.key}.{extension}") for extension in sample.extensions):
            found.problems.append(f"{name}: key {sample.key!r}: a name too long for a tar; shorten it to 90 bytes")

    try:
        scan = scan_tar(name, storage.stream(url), add)
    except StorageError:
        raise
    except OSError as error:
        found.problems.append(f"{url}: cannot be read: {error.strerror or error}")
        return
    if scan.cut:
        found.problems.append(f"{name}: {scan.cut}")
    found.problems += [str(problem) for problem in scan.problems if not problem.reason.startswith(NO_LABEL)]


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
        problems.append(f"{url}: compressed in a way that is not read here; decompress it, or use gzip")
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


def _class_names(base: str, largest: int, given: Sequence[str] | None, problems: list[str]) -> tuple[str, ...]:
    if largest < 0:
        return ()
    names = given if given is not None else _known_classes(base)
    if given is not None and len(given) <= largest:
        problems.append(f"{len(given)} classes given, labels go up to {largest}; give a name for each from 0")
    elif largest >= MOST_CLASSES:
        problems.append(f"a label {largest}: too large for the number of a class; number the classes from 0")
    return (
        tuple(names) if len(names) > largest else tuple(str(number) for number in range(min(largest, MOST_CLASSES) + 1))
    )


def _known_classes(base: str) -> tuple[str, ...]:
    try:
        return load_manifest(base).classes
    except StorageError:
        raise
    except DataError:
        return ()  # shards that were never indexed


def _read_members(item: Item) -> dict[str, bytes]:
    url, _, span = item.where.rpartition("@")
    start, length = map(int, span.split("+"))
    data = storage.read(url, start, length)
    if len(data) != length or zlib.crc32(data) != item.version:
        raise OSError("changed since it was listed; run again")
    return unpack_sample(data)[1]


def _read_image(item: Item) -> bytes:
    return _read_members(item)[item.extension]
