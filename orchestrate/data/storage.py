"""Bytes of a file by URL: the one seam between the data plane and where the data lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from orchestrate.errors import DataError


def local_path(url: str) -> Path | None:
    """Turn a path or `file://` URL into a path; None for a URL of another store."""
    if url.startswith("file://"):
        return Path(unquote(url.removeprefix("file://")))
    return None if "://" in url else Path(url).expanduser()


def join(url: str, name: str) -> str:
    """Name a file of a dataset folder."""
    return f"{url.rstrip('/')}/{name}"


def read(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `offset`, or up to the end; fewer bytes come back where the file ends early.

    Local files are opened for each call: no descriptor is kept, so any number of shards and threads is fine.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        DataError: no client for this kind of URL.
    """
    path = local_path(url)
    if path is None:
        store, remote = _remote(url)
        data: bytes = store.cat_file(remote, start=offset, end=None if length is None else offset + length)
        return data
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _read_at(descriptor, offset, os.fstat(descriptor).st_size - offset if length is None else length)
    finally:
        os.close(descriptor)


def size(url: str) -> int:
    """Measure a file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no client for this kind of URL.
    """
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    store, remote = _remote(url)
    return int(store.size(remote))


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Read the whole range: one `pread` stops at 2 GiB and may stop earlier on network file systems."""
    pieces: list[bytes] = []
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _remote(url: str) -> tuple[Any, str]:
    """Find the fsspec client of a URL; imported here because local data and `--help` never need it."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot open this kind of URL: {error}") from error
    return store, path
