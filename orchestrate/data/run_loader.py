"""Bytes of neighbouring samples: from the node's disk cache where they are, else from the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from uuid import uuid4

from orchestrate.data.cache import DiskCache, Gap
from orchestrate.data.fetch import ByteRange, Fetcher
from orchestrate.data.reader import Place, Reader, Run


class RunLoader:
    """Load runs of neighbouring samples, and single ones, from any number of threads."""

    def __init__(self, reader: Reader, fetcher: Fetcher, cache: DiskCache | None = None) -> None:
        self.reader, self.fetcher, self.cache = reader, fetcher, cache
        self.single_reads = 0  # samples that were fetched by themselves
        self._counting = threading.Lock()
        self._owner = f"{os.getpid()}-{uuid4().hex[:8]}"

    def load(self, run: Run) -> bytes:
        """Return the bytes of a run; what the cache lacks of it is fetched, and kept there if there is room.

        Raises:
            StorageError: the store does not answer.
            DataError: the shard is missing or was changed.
        """
        self.reader.touch(run.number)
        if self.cache is None:
            return self._fetch(run.number, run.start, run.stop).result()
        gaps = self.cache.missing(run.shard.sha256, run.start, run.stop)
        fetched = [(start, stop, self._fetch(run.number, start, stop)) for start, stop in gaps]
        pieces, at = [], run.start
        for start, stop, future in fetched:
            pieces += [self._cached(run, at, start), future.result()]
            self.cache.admit(run.shard.sha256, start, pieces[-1], hold="")
            at = stop
        pieces = [piece for piece in [*pieces, self._cached(run, at, run.stop)] if piece]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def reserve(self, runs: Sequence[Run]) -> list[Gap] | None:
        """Make room in the cache for runs, and keep them from eviction until `release`; None if there is no room."""
        if self.cache is None:
            return None
        gaps: list[Gap] = []
        for number, run in enumerate(runs):
            found = self.cache.reserve(run.shard.sha256, run.start, run.stop, hold=self._owner)
            if found is None:
                self.give_up(gaps)
                self.release(runs[:number])
                return None
            gaps += found
        return gaps

    def fill(self, runs: Sequence[Run], gaps: Sequence[Gap]) -> None:
        """Fetch into the cache what was reserved; raises as `load` does."""
        assert self.cache is not None
        numbers = {run.shard.sha256: run.number for run in runs}
        for run in runs:
            self.reader.touch(run.number)
        fetched = [(gap, self._fetch(numbers[gap.shard_sha256], gap.start, gap.stop)) for gap in gaps]
        for gap, future in fetched:
            self.cache.fill(gap, future.result())

    def give_up(self, gaps: Sequence[Gap]) -> None:
        """Return room that was reserved."""
        for gap in gaps:
            assert self.cache is not None
            self.cache.give_up(gap)

    def release(self, runs: Sequence[Run]) -> None:
        """Let the cache evict what was reserved."""
        for run in runs:
            assert self.cache is not None
            self.cache.release(run.shard.sha256, run.start, run.stop, self._owner)

    def load_sample(self, place: Place) -> bytes:
        """Return the bytes of one sample, at once; raises as `load` does."""
        if self.cache is not None:
            data = self.cache.read(place.shard.sha256, place.start, place.stop)
            if data is not None:
                return data
        with self._counting:
            self.single_reads += 1
        self.reader.touch(place.number)
        return self._fetch(place.number, place.start, place.stop, urgent=True).result()

    def settle(self, place: Place, data: bytes | memoryview) -> tuple[Place, bytes]:
        """Read a sample again whose bytes are wrong, whatever the cache holds of it; see `Reader.settle`."""
        if self.cache is not None:
            self.cache.forget(place.shard.sha256, place.start, place.stop)
        return self.reader.settle(place, data)

    def facts(self) -> dict[str, float]:
        """Count requests, retries and bytes, those for indexes too, and samples that were fetched by themselves."""
        own = self.reader.counts.snapshot()
        counts = {name: count + own[name] for name, count in self.fetcher.counts.snapshot().items()}
        return {**counts, "single_reads": float(self.single_reads)}

    def close(self) -> None:
        """Stop fetching; whoever waits gets CancelledError."""
        self.fetcher.close()
        self.reader.close()
        if self.cache is not None:
            self.cache.close()

    def _fetch(self, number: int, start: int, stop: int, *, urgent: bool = False) -> Future[bytes]:
        try:
            return self.fetcher.submit(ByteRange(self.reader.shard_url(number), start, stop), urgent=urgent)
        except RuntimeError:  # closed between two reads: those who wait for the first one are sent home the same way
            raise CancelledError from None

    def _cached(self, run: Run, start: int, stop: int) -> bytes:
        """Read a part of a run from the cache, from the store if it was evicted just now."""
        if start == stop:
            return b""
        assert self.cache is not None
        data = self.cache.read(run.shard.sha256, start, stop)
        return data if data is not None else self._fetch(run.number, start, stop).result()


def open_loader(reader: Reader, cache: Path | None, cache_bytes: int) -> RunLoader:
    """Open a loader with a fetcher of its own, and the cache in that folder."""
    return RunLoader(reader, Fetcher(), DiskCache(cache, max_bytes=cache_bytes) if cache is not None else None)
