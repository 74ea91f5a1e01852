"""Bytes of a file by URL: the one seam between the data plane and where the data lies.

Local paths (and file://; parallel file systems are local) are read with `pread`. All other URLs go through fsspec, each
request retried by `orchestrate.data.retry`: s3://, gs://, http(s)://, memory:// and what else is installed.

Endpoints and credentials come from the environment, so that worker processes find them too. For S3 and its
relatives: AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, read when
the first client is made; FSSPEC_S3_ENDPOINT_URL works too and wins, but is read when fsspec is imported.

Clients run an event loop in a thread: after the first remote read a process must not fork. Start workers with `spawn`.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from orchestrate.data.retry import PATIENCE, Fault, Patience, ReadCounts, ShortReadError, classify, with_retries
from orchestrate.runs import sync_folder

T = TypeVar("T")

STREAM_PIECE_BYTES = 8 << 20
TAR_SUFFIX = ".tar"
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_VERSION_KINDS = ("etag", "mtime", "time")
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Size in bytes, and a text that changes with the contents, "" where unknown.

    The text begins with its kind: "etag:", "mtime:" (local files, nanoseconds) or "time:" (as a store writes it);
    compare with `versions_differ`.
    """

    size: int
    version: str


def versions_differ(one: str, other: str) -> bool:
    """Say whether two versions are known to be of different contents: those of different kinds are not compared."""
    kind = one.partition(":")[0]
    return kind in _VERSION_KINDS and kind == other.partition(":")[0] and one != other


def local_path(url: str) -> Path | None:
    """Turn a path or `file://` URL into a path; None for a URL of another store."""
    if url.startswith("file://"):
        return Path(unquote(url.removeprefix("file://")))
    return None if "://" in url else Path(url).expanduser()


def join(url: str, name: str) -> str:
    """Name a file of a dataset folder."""
    return f"{url.rstrip('/')}/{name}"


def read(
    url: str,
    offset: int = 0,
    length: int | None = None,
    *,
    counts: ReadCounts | None = None,
    patience: Patience = PATIENCE,
) -> bytes:
    """Read `length` bytes from `offset`, or up to the end; fewer bytes come back where the file ends early.

    Local files are opened for each call: no descriptor is kept, so any number of shards and threads is fine.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        OSError: it cannot be read.
        StorageError: the store did not answer within its retries.
        DataError: no client for this kind of URL, or the server ignores byte ranges.
    """
    data = _retried(url, partial(read_once, url, offset, length, patience=patience), counts, patience)
    if counts is not None:
        counts.add(bytes=len(data))
    return data


def read_once(url: str, offset: int, length: int | None, *, patience: Patience = PATIENCE) -> bytes:
    """Try once to read as `read` does; for callers that retry."""
    path = local_path(url)
    if path is None:
        from orchestrate.data import remote_store

        return remote_store.read_range(url, offset, length, patience)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _read_at(descriptor, offset, os.fstat(descriptor).st_size - offset if length is None else length)
    finally:
        os.close(descriptor)


def info(url: str, *, counts: ReadCounts | None = None, patience: Patience = PATIENCE) -> ObjectInfo:
    """Ask for size and version of a file, never from a cache.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError, DataError: see `read`.
    """
    return _retried(url, partial(_info_once, url, patience), counts, patience)


def size(url: str) -> int:
    """Measure a file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError, DataError: see `read`.
    """
    return info(url).size


def exists(url: str) -> bool:
    """Say whether a file is there.

    Raises:
        StorageError, DataError: see `read`.
    """
    try:
        info(url)
    except FileNotFoundError:
        return False
    return True


def stream(
    url: str, offset: int = 0, *, counts: ReadCounts | None = None, patience: Patience = PATIENCE
) -> Iterator[bytes]:
    """Read a file in order, in pieces of 8 MiB, up to the size it has at the start; a fault costs one piece at most.

    Raises:
        OSError, StorageError, DataError: see `read`.
        ShortReadError: the file became shorter meanwhile.
    """
    end = info(url, counts=counts, patience=patience).size
    while offset < end:
        piece = read(url, offset, min(STREAM_PIECE_BYTES, end - offset), counts=counts, patience=patience)
        if not piece:
            raise ShortReadError(f"{url}: had {end:,} bytes at first and now ends at {offset:,}")
        yield piece
        offset += len(piece)


def write(url: str, data: bytes, *, patience: Patience = PATIENCE) -> None:
    """Write a whole file or nothing, over an old one if there is one; folders are made.

    Raises:
        OSError: it cannot be written.
        StorageError: the store did not answer within its retries.
        DataError: this kind of store cannot be written.
    """
    path = local_path(url)
    if path is not None:
        _write_local(path, data)
        return
    from orchestrate.data import remote_store

    once = partial(remote_store.write_object, url, data, patience)
    with_retries(once, what=url, counts=ReadCounts(), patience=patience)


def remove_folder(url: str, *, patience: Patience = PATIENCE) -> None:
    """Remove a folder with all that is in it; one that is not there, or may not be removed, is left alone.

    Raises:
        StorageError: the store did not answer within its retries.
    """
    path = local_path(url)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    from orchestrate.data import remote_store

    try:
        once = partial(remote_store.remove_folder, url, patience)
        with_retries(once, what=url, counts=ReadCounts(), patience=patience)
    except (FileNotFoundError, PermissionError):
        pass


def list_tars(url: str, *, patience: Patience = PATIENCE) -> list[str]:
    """List tars, compressed ones too, sorted by name, as names relative to `base_folder(url)`.

    Args:
        url: a folder (its own tars, not those of folders below), one tar, or a pattern with {000..127}, {a,b}, *, ?
            or []. Without *, ? and [] a pattern is only written out: nothing is listed, so it works on stores that
            cannot list, and files that are missing show later.

    Raises:
        FileNotFoundError: there is no such folder.
        StorageError, DataError: see `read`.
    """
    base = base_folder(url)
    if base == url:
        names = set(_list(url, None, patience))
    else:
        patterns = expand_braces(chosen_tars(url))
        listed = (_list(base, pattern, patience) if _MAGIC.search(pattern) else [pattern] for pattern in patterns)
        names = set(itertools.chain.from_iterable(listed))
    return sorted(name for name in names if name.endswith((TAR_SUFFIX, *COMPRESSED_TAR_SUFFIXES)))


def base_folder(url: str) -> str:
    """Return the folder to which the names of `list_tars` are relative: what comes before a pattern or a tar's name."""
    path = local_path(url)
    if path is not None and path.is_dir():
        return url
    pattern = re.search(r"[*?[{]", url)
    if pattern:
        return url[: pattern.start()].rpartition("/")[0] or ("." if path is not None and url[0] != "/" else "/")
    if url.endswith((TAR_SUFFIX, *COMPRESSED_TAR_SUFFIXES)):
        return url.rpartition("/")[0] or "."
    return url


def chosen_tars(url: str) -> str:
    """Return the pattern or the name of a tar in a URL of shards, "" for a folder: what follows `base_folder`."""
    base = base_folder(url)
    if base == url:
        return ""
    prefix = f"{base.rstrip('/')}/"
    return url[len(prefix) :].lstrip("/") if url.startswith(prefix) else url


def expand_braces(pattern: str) -> list[str]:
    """Write out {000..127} (the zeros of the first number are kept) and {a,b}, in order."""
    found = _RANGE.search(pattern) or _CHOICE.search(pattern)
    if not found:
        return [pattern]
    if found.re is _CHOICE:
        choices = found[1].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        step = 1 if first <= last else -1
        choices = [str(number).zfill(len(found[1])) for number in range(first, last + step, step)]
    tails = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + choice + tail for choice in choices for tail in tails]


def _retried(url: str, call: Callable[[], T], counts: ReadCounts | None, patience: Patience) -> T:
    """Call at once for a local file, with retries after a fault that may pass (a stale handle of a network folder)."""
    if "://" not in url or url.startswith("file://"):
        try:
            return call()
        except OSError as error:
            if classify(error) is not Fault.TRANSIENT:
                raise
    return with_retries(call, what=url, counts=counts or ReadCounts(), patience=patience)


def _info_once(url: str, patience: Patience) -> ObjectInfo:
    path = local_path(url)
    if path is not None:
        status = path.stat()
        return ObjectInfo(status.st_size, f"mtime:{status.st_mtime_ns}")
    from orchestrate.data import remote_store

    return ObjectInfo(*remote_store.stat(url, patience))


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Read the whole range: one `pread` stops at 2 GiB and may stop earlier on network file systems."""
    pieces: list[bytes] = []
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write_local(path: Path, data: bytes) -> None:
    """Write aside, sync, rename, sync the folder: a crash leaves the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _list(folder: str, pattern: str | None, patience: Patience) -> list[str]:
    path = local_path(folder)
    if path is None:
        from orchestrate.data import remote_store

        once = partial(remote_store.list_names, folder, pattern, patience)
        return with_retries(once, what=folder, counts=ReadCounts(), patience=patience)
    if pattern is None:
        return [entry.name for entry in path.iterdir()]
    return [found.relative_to(path).as_posix() for found in path.glob(pattern)]
