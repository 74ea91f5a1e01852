"""The indexes of a dataset's shards: where in a tar each sample lies, and what its checksum is."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrate.data.index import SIDECAR_ENTRY, Manifest, Shard
from orchestrate.data.shards import sidecar_crc
from orchestrate.errors import DataError, StorageError

_KEPT_SAMPLES = 10_000_000  # 12 bytes each
_TRIES = 3  # for an index that comes damaged from a store
_CONFIRMING_TRIES = 6
_PAUSE_SECONDS = 0.1  # before the second try, twice as long before the third, ...
_FIX = "run `orchestrate data verify --repair`"


class Entries(NamedTuple):
    """Of the samples of a shard: offsets (one more than samples) and CRC32 of their byte ranges."""

    offsets: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]


class Sidecars:
    """Load indexes when they are first asked for, each once at a time, from any number of threads.

    The last ones used stay in memory. What does not agree with the manifest is read again.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        read: Callable[[str], bytes],
        pause: Callable[[float], None],
        folder: Path | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            url: folder of the manifest.
            manifest: of the dataset.
            read: reads a whole file.
            pause: waits so many seconds.
            folder: keeps copies of the indexes on a local disk.
        """
        self._url, self._manifest, self._read, self._pause, self._folder = url, manifest, read, pause, folder
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Entries] = OrderedDict()
        self._num_kept = 0  # samples
        self._loading: dict[int, Future[Entries]] = {}
        self._confirmed: set[int] = set()

    def get(self, number: int) -> Entries:
        """Return the index of a shard, by its place in the manifest.

        Raises:
            DataError: missing, or damaged each time it was read.
            StorageError: the store does not answer.
        """
        with self._lock:
            if (entries := self._kept.get(number)) is not None:
                self._kept.move_to_end(number)
                return entries
            loading = self._loading.get(number)
            if loading is None:
                mine = self._loading[number] = Future[Entries]()
        if loading is not None:
            return loading.result()
        try:
            entries = self._load(number)
            self._keep(number, entries)
            mine.set_result(entries)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._loading[number]
        return entries

    def is_at_hand(self, number: int) -> bool:
        """Tell whether an index is in memory."""
        return number in self._kept

    def confirm(self, number: int) -> None:
        """Read an index that has no checksum from the store again until two reads agree; see `get`.

        Raises:
            StorageError: no two reads agree.
        """
        shard = self._manifest.shards[number]
        if shard.sidecar_crc or number in self._confirmed:
            return
        before = self.get(number)
        for _ in range(_CONFIRMING_TRIES):
            entries = self._fetch(number)
            self._keep(number, entries)
            if np.array_equal(before.offsets, entries.offsets) and np.array_equal(before.checksums, entries.checksums):
                self._confirmed.add(number)
                return
            before = entries
        url = self._manifest.sidecar_url(self._url, shard)
        raise StorageError(f"{url}: other bytes at each read; check the store and the network, then start again")

    def _keep(self, number: int, entries: Entries) -> None:
        with self._lock:
            if (old := self._kept.pop(number, None)) is not None:
                self._num_kept -= len(old.checksums)
            self._kept[number] = entries
            self._num_kept += len(entries.checksums)
            while self._num_kept > _KEPT_SAMPLES and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._num_kept -= len(dropped.checksums)

    def _load(self, number: int) -> Entries:
        path = self._path(number)
        if path is not None and path.exists():
            found = parse_entries(path.read_bytes(), self._manifest.shards[number])
            if isinstance(found, Entries):
                return found
            path.unlink(missing_ok=True)
        return self._fetch(number)

    def _fetch(self, number: int) -> Entries:
        """Read an index from the store, and keep a copy if it is what the manifest says."""
        shard = self._manifest.shards[number]
        url = self._manifest.sidecar_url(self._url, shard)
        for attempt in range(_TRIES):
            if attempt:
                self._pause(_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                data = self._read(url)
            except FileNotFoundError:
                raise DataError(f"{url}: missing; {_FIX}") from None
            found = parse_entries(data, shard)
            if isinstance(found, Entries):
                self._write_copy(number, data)
                return found
        raise DataError(f"{url}: {found}; {_FIX}")

    def _path(self, number: int) -> Path | None:
        return self._folder / f"{self._manifest.shards[number].sha256}.idx" if self._folder is not None else None

    def _write_copy(self, number: int, data: bytes) -> None:
        path = self._path(number)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")  # ranks may write it at once
            aside.write_bytes(data)
            aside.replace(path)


def parse_entries(data: bytes, shard: Shard) -> Entries | str:
    """Turn the bytes of an index into offsets and checksums, or say why they are not the index of this shard."""
    if len(data) != SIDECAR_ENTRY.size * shard.samples:
        return f"{len(data):,} bytes for {shard.samples:,} samples, must be {SIDECAR_ENTRY.size} each"
    if shard.sidecar_crc and sidecar_crc(data) != shard.sidecar_crc:
        return f"CRC32 is {sidecar_crc(data)}, the manifest says {shard.sidecar_crc}"
    entries = np.frombuffer(data, dtype="<u4").reshape(-1, 2)
    offsets = np.zeros(len(entries) + 1, dtype=np.int64)
    np.cumsum(entries[:, 0], out=offsets[1:])
    if offsets[-1] > shard.bytes:
        return "does not fit its shard"
    return Entries(offsets, entries[:, 1].copy())
