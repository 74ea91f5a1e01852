"""The bytes that a rank needs next, fetched ahead from a store in long ranges and kept until the last use.

A thread walks the read plan in order of first use. A read is loaded into memory while there is room; beyond that into
the node's disk cache, if there is one; beyond that its samples are read one by one when they are asked for. What comes
out does not depend on any of this.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from orchestrate.data.cache import DiskCache
from orchestrate.data.fetch import ByteRange, Fetcher
from orchestrate.data.order import Order
from orchestrate.data.reader import Place, Reader, Run
from orchestrate.data.readplan import Read, plan_reads

_LOADERS = 64  # threads that wait for the store; how many requests are open at a time, the fetcher decides
_BLOCKS = 2  # of the order that are held at a time: one in use, one on its way


@dataclass
class _Kept:
    """A read on its way or here; `runs` are (shard number, first byte, bytes), none if only the cache holds it."""

    read: Read
    block: int
    uses: int
    num_bytes: int
    in_memory: bool
    runs: Future[list[tuple[int, int, bytes]]] = field(default_factory=Future)


class RunLoader:
    """Load runs of neighbouring samples: from the node's cache where they are, else from the store."""

    def __init__(self, reader: Reader, fetcher: Fetcher, cache: DiskCache | None = None) -> None:
        self.reader, self.fetcher, self.cache = reader, fetcher, cache
        self._owner = f"{os.getpid()}-{uuid4().hex[:8]}"

    def load(self, run: Run, *, keep: bool = False) -> bytes:
        """Return the bytes of a run.

        Args:
            run: what to load.
            keep: do not evict it from the cache before `release`.

        Raises:
            StorageError: the store does not answer.
            DataError: the shard is missing or was changed.
        """
        self.reader.touch(run.number)
        url, sha256 = self.reader.shard_url(run.number), self.reader.manifest.shards[run.number].sha256
        if self.cache is None:
            return self.fetcher.submit(ByteRange(url, run.start, run.stop)).result()
        if keep:
            self.cache.hold(sha256, run.start, run.stop, self._owner)
        data = self.cache.read(sha256, run.start, run.stop)
        if data is not None:
            return data
        gaps = self.cache.missing(sha256, run.start, run.stop)
        fetched = [(start, self.fetcher.submit(ByteRange(url, start, stop))) for start, stop in gaps]
        for start, future in fetched:
            self.cache.admit(sha256, start, future.result(), hold=self._owner if keep else "")
        if len(gaps) == 1 and gaps[0] == (run.start, run.stop):
            return fetched[0][1].result()
        data = self.cache.read(sha256, run.start, run.stop)
        # Evicted by another process, or not admitted: the store has it.
        return data if data is not None else self.fetcher.submit(ByteRange(url, run.start, run.stop)).result()

    def load_sample(self, place: Place) -> bytes:
        """Return the bytes of one sample, at once."""
        if self.cache is not None:
            data = self.cache.read(place.shard.sha256, place.start, place.stop)
            if data is not None:
                return data
        wanted = ByteRange(self.reader.shard_url(place.number), place.start, place.stop)
        return self.fetcher.submit(wanted, urgent=True).result()

    def load_again(self, place: Place) -> bytes:
        """Return the bytes of one sample from the store, whatever the cache holds of it."""
        if self.cache is not None:
            self.cache.forget(place.shard.sha256, place.start, place.stop)
        return self.reader.fetch(place)

    def facts(self) -> dict[str, float]:
        """Count requests, retries and bytes, those for indexes too."""
        own = self.reader.counts.snapshot()
        return {name: count + own[name] for name, count in self.fetcher.counts.snapshot().items()}

    def close(self) -> None:
        """Stop fetching."""
        self.fetcher.close()
        if self.cache is not None:
            self.cache.close()

    def release(self, run: Run) -> None:
        """Let the cache evict a run that was kept."""
        if self.cache is not None:
            shard = self.reader.manifest.shards[run.number]
            self.cache.release(shard.sha256, run.start, run.stop, self._owner)


def open_loader(reader: Reader, cache: Path | None, cache_bytes: int) -> RunLoader:
    """Open a loader with a fetcher of its own, and the cache in that folder."""
    return RunLoader(reader, Fetcher(), DiskCache(cache, max_bytes=cache_bytes) if cache is not None else None)


class Window:
    """Samples' bytes in the order of a rank's plan; call `sample` from any number of threads."""

    def __init__(
        self, loader: RunLoader, order: Order, *, rank: int, world_size: int, start_step: int, memory_bytes: int
    ) -> None:
        """Begin to fetch what the rank needs from a step on; holds at most `memory_bytes`, beside what is in flight."""
        self._loader, self._order, self._room = loader, order, memory_bytes
        self._plan = plan_reads(order, rank=rank, world_size=world_size, start_step=start_step)
        self._changed = threading.Condition()
        self._kept: dict[tuple[int, int], _Kept] = {}  # by epoch and first sample id
        self._early: set[tuple[int, int]] = set()  # samples that were read by themselves before their read was planned
        self._left: Counter[int] = Counter()  # reads in use or to come, by block
        self._bytes = self._waiting = 0
        self._full = self._closed = False
        self._failure: BaseException | None = None
        self.single_reads = 0  # samples that were fetched by themselves, for want of room
        self.peak_bytes = 0  # most that was held, by estimate
        self._pool = ThreadPoolExecutor(_LOADERS, thread_name_prefix="window")
        self._planner = threading.Thread(target=self._walk, name="read plan", daemon=True)
        self._planner.start()

    def sample(self, epoch: int, place: Place) -> bytes | memoryview:
        """Return the bytes of a sample that the plan holds, once.

        Raises:
            StorageError: the store does not answer.
            DataError: a shard of this or of the next block is missing or was changed.
        """
        kept = self._await(epoch, place.sample_id)
        if kept is None:
            self.single_reads += 1
            return self._loader.load_sample(place)
        try:
            runs = kept.runs.result()
        finally:
            self._use(kept)
        for run_number, start, data in runs:
            if run_number == place.number and start <= place.start and place.stop <= start + len(data):
                return memoryview(data)[place.start - start : place.stop - start]
        return self._loader.load_sample(place)

    def skip(self, epoch: int, sample_id: int) -> None:
        """Count a sample of the plan as used."""
        kept = self._await(epoch, sample_id)
        if kept is not None:
            self._use(kept)

    def close(self) -> None:
        """Stop fetching; wakes whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            waited_for = [kept.runs for kept in self._kept.values()]
        self._pool.shutdown(wait=False, cancel_futures=True)
        for runs in waited_for:
            runs.cancel()
        self._planner.join()

    def _await(self, epoch: int, sample_id: int) -> _Kept | None:
        """Wait until the read of a sample is planned; None if there is no room for it now."""
        chunk = self._order.chunk_around(epoch, sample_id)
        keys = ((epoch, chunk.start), (epoch, sample_id))
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                for key in keys:
                    if (kept := self._kept.get(key)) is not None and sample_id in kept.read.ids:
                        return kept
                if self._closed:
                    raise CancelledError
                if self._full:
                    self._early.add((epoch, sample_id))
                    return None
                self._waiting += 1
                self._changed.notify_all()
                self._changed.wait()
                self._waiting -= 1

    def _use(self, kept: _Kept) -> None:
        with self._changed:
            kept.uses -= 1
            if kept.uses > 0:
                return
            del self._kept[kept.read.epoch, kept.read.ids.start]
            self._bytes -= kept.num_bytes if kept.in_memory else 0
            self._finish(kept.block)
        if self._loader.cache is not None:
            for run in self._loader.reader.runs(kept.read.ids):
                self._loader.release(run)

    def _finish(self, block: int) -> None:
        self._left[block] -= 1
        if not self._left[block]:
            del self._left[block]
        self._changed.notify_all()

    def _walk(self) -> None:
        try:
            for number, block in enumerate(self._plan):
                if not self._begin(number):
                    return
                for read in block:
                    kept = self._admit(number, read)
                    if kept is not None:
                        self._pool.submit(self._load, kept)
                with self._changed:
                    self._finish(number)
        except BaseException as error:
            self._fail(error)

    def _begin(self, block: int) -> bool:
        """Wait until a block is near enough to be fetched, or somebody needs it; False if the window was closed."""
        with self._changed:
            while not self._closed and len(self._left) >= _BLOCKS and not self._waiting:
                self._changed.wait()
            self._left[block] = 1  # until all of its reads are entered
            return not self._closed

    def _admit(self, block: int, read: Read) -> _Kept | None:
        """Wait for room for a read and enter it; None if its uses are over or the window was closed."""
        size, key = self._loader.reader.num_bytes(read.ids), (read.epoch, read.ids.start)
        with self._changed:
            while not self._closed:
                fits = self._bytes + size <= self._room
                if fits or self._loader.cache is not None:
                    break
                self._full = True
                self._changed.notify_all()
                self._changed.wait()
            self._full = False
            early = {(read.epoch, sample_id) for sample_id in read.ids} & self._early
            self._early -= early
            uses = read.uses - len(early)
            if self._closed or uses <= 0:
                return None
            kept = self._kept[key] = _Kept(read, block, uses, size, in_memory=fits)
            self._left[block] += 1
            self._bytes += size if fits else 0
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            self._changed.notify_all()
            return kept

    def _load(self, kept: _Kept) -> None:
        if not kept.runs.set_running_or_notify_cancel():
            return
        try:
            runs = self._loader.reader.runs(kept.read.ids)
            loaded = [(run.number, run.start, self._loader.load(run, keep=True)) for run in runs]
            kept.runs.set_result(loaded if kept.in_memory else [])
        except BaseException as error:
            kept.runs.set_exception(error)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
