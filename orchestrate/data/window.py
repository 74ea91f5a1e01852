"""The bytes that a rank needs next, fetched ahead from a store in long ranges and kept until the last use.

A thread walks the read plan in order of first use. A read is loaded into memory while there is room; beyond that into
the node's disk cache, if there is one with room; beyond that the walk waits, and samples that are needed before their
read had its turn are read one by one. What comes out does not depend on any of this.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto

from orchestrate.data.cache import Gap
from orchestrate.data.order import Order
from orchestrate.data.reader import Place, Run
from orchestrate.data.readplan import WORTH_WHOLE, Read, plan_reads
from orchestrate.data.run_loader import RunLoader

_LOADERS = 64  # threads that wait for the store; how many requests are open at a time, the fetcher decides
_SINGLE_LOADERS = 32  # more, for samples that are read by themselves, and for indexes
_READS_AHEAD = 64  # whose indexes are asked for before their turn
_SINGLES_BYTES = 256 << 20  # of samples that are read by themselves before they are asked for
_BLOCKS = 2  # of the order that are held at a time: one in use, one on its way
_CLOSING_SECONDS = 2.0

_Key = tuple[int, int]  # epoch and sample id


class _Where(Enum):
    MEMORY = auto()
    CACHE = auto()
    STORE = auto()  # there is no room for it: its samples are read one by one


@dataclass
class _Kept:
    """A read on its way or here; `data` are the bytes of its runs, none unless they are held in memory."""

    read: Read
    block: int
    uses: int
    runs: Sequence[Run]
    where: _Where
    gaps: Sequence[Gap] = ()
    data: Future[list[bytes]] = field(default_factory=Future)

    @property
    def held_bytes(self) -> int:
        """Count the bytes that it takes of the memory."""
        return _num_bytes(self.runs) if self.where is _Where.MEMORY else 0

    def find(self, sample_id: int) -> tuple[int, Run]:
        """Find the run that holds a sample."""
        return next((at, run) for at, run in enumerate(self.runs) if sample_id in run.ids)


@dataclass(frozen=True)
class _Single:
    """A sample that `prepare` asked for; `early`: its read does not know of it, or no longer counts it."""

    num_bytes: int
    early: bool
    data: Future[tuple[Place, bytes]]


class Window:
    """Samples' bytes in the order of a rank's plan; call `sample` from any number of threads."""

    def __init__(
        self, loader: RunLoader, order: Order, *, rank: int, world_size: int, start_step: int, memory_bytes: int
    ) -> None:
        """Begin to fetch what the rank needs from a step on.

        Holds at most `memory_bytes`, beside what is in flight and what `prepare` asked for.
        """
        self._loader, self._order, self._room = loader, order, memory_bytes
        self._plan = plan_reads(order, rank=rank, world_size=world_size, start_step=start_step)
        self._lock = threading.RLock()
        self._planned = threading.Condition(self._lock)  # for those who ask for samples
        self._needed = threading.Condition(self._lock)  # for the walk: there is room, or somebody waits
        self._kept: dict[_Key, _Kept] = {}  # by epoch and first sample id
        self._early: set[_Key] = set()  # samples that were read by themselves before their read had its turn
        self._prepared: set[_Key] = set()  # samples that are wanted soon, of reads that had no turn yet
        self._singles: dict[_Key, _Single] = {}
        self._left: Counter[int] = Counter()  # reads in use or to come, by block
        self._bytes = self._singles_bytes = self._waiting = self._freed = 0
        self._full = self._closed = False
        self._failure: BaseException | None = None
        self.peak_bytes = 0  # most that was held
        self._pool = ThreadPoolExecutor(_LOADERS, thread_name_prefix="window")
        self._single_pool = ThreadPoolExecutor(_SINGLE_LOADERS, thread_name_prefix="window single")
        self._planner = threading.Thread(target=self._walk, name="read plan", daemon=True)
        self._planner.start()

    @property
    def held_bytes(self) -> int:
        """Count what is in memory now, byte by byte; for tests."""
        with self._lock:
            done = [kept.data for kept in self._kept.values() if kept.data.done() and not kept.data.exception()]
        return sum(len(data) for future in done for data in future.result())

    @property
    def early_samples(self) -> int:
        """Count the samples that are remembered as read before their time; for tests."""
        return len(self._early)

    def prepare(self, wanted: Iterable[_Key]) -> None:
        """Ask at once for those of the samples, by epoch and id, that will have to be read by themselves.

        Those whose read had no turn yet are asked for when that comes. Returns at once.
        """
        with self._lock:
            keys = set(wanted)
            self._prepared |= keys
            self._ask_for_singles(keys)

    def sample(self, epoch: int, sample_id: int) -> tuple[Place, bytes | memoryview]:
        """Return the bytes of a sample that the plan holds, once, and where they lie in the store.

        Raises:
            StorageError: the store does not answer.
            DataError: a shard of this or of the next block is missing or was changed.
        """
        kept, single = self._await(epoch, sample_id)
        try:
            if single is not None:
                return single.result()
            if kept is None:
                return self._load_single(sample_id)
            at, run = kept.find(sample_id)
            place = run.place(sample_id)
            data = kept.data.result()
            if kept.where is not _Where.MEMORY:
                return place, self._loader.load_sample(place)
            return place, memoryview(data[at])[run.part(sample_id)]
        finally:
            if kept is not None:
                self._use(kept)

    def skip(self, epoch: int, sample_id: int) -> None:
        """Count a sample of the plan as used."""
        kept, single = self._await(epoch, sample_id)
        if single is not None:
            single.cancel()
        if kept is not None:
            self._use(kept)

    def close(self) -> None:
        """Stop fetching and wake who waits here; close the loader next, which wakes who waits for the store."""
        with self._lock:
            self._closed = True
            self._planned.notify_all()
            self._needed.notify_all()
            waited_for = [kept.data for kept in self._kept.values()]
        for pool in (self._pool, self._single_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for data in waited_for:
            data.cancel()

    def join(self) -> None:
        """Wait until the walk has ended, but not for long: it may be about to plan a block."""
        self._planner.join(_CLOSING_SECONDS)

    def _find(self, epoch: int, sample_id: int) -> _Kept | None:
        for first in (self._order.chunk_around(epoch, sample_id).start, sample_id):
            if (kept := self._kept.get((epoch, first))) is not None and sample_id in kept.read.ids:
                return kept
        return None

    def _await(self, epoch: int, sample_id: int) -> tuple[_Kept | None, Future[tuple[Place, bytes]] | None]:
        """Wait until the read of a sample had its turn, or there is no room for it; also find what `prepare` began."""
        key = epoch, sample_id
        with self._lock:
            while True:
                if self._failure is not None:
                    raise self._failure
                if (single := self._singles.pop(key, None)) is not None:
                    self._singles_bytes -= single.num_bytes
                    return None if single.early else self._find(*key), single.data
                if (kept := self._find(*key)) is not None:
                    return kept, None
                if self._closed:
                    raise CancelledError
                if self._full:
                    self._prepared.discard(key)
                    self._early.add(key)
                    return None, None
                self._waiting += 1
                if self._waiting == 1:
                    self._needed.notify()
                self._planned.wait()
                self._waiting -= 1

    def _ask_for_singles(self, keys: Iterable[_Key]) -> None:
        for key in keys:
            kept = self._find(*key)
            if self._closed or (kept is None and not self._full):
                continue
            self._prepared.discard(key)
            size = self._loader.reader.num_bytes(range(key[1], key[1] + 1))
            if (kept is None or kept.where is _Where.STORE) and self._singles_bytes + size <= _SINGLES_BYTES:
                if kept is None:
                    self._early.add(key)
                self._singles_bytes += size
                self._singles[key] = _Single(size, kept is None, self._single_pool.submit(self._load_single, key[1]))

    def _load_single(self, sample_id: int) -> tuple[Place, bytes]:
        place = self._loader.reader.place(sample_id)
        return place, self._loader.load_sample(place)

    def _use(self, kept: _Kept) -> None:
        with self._lock:
            kept.uses -= 1
            if kept.uses > 0:
                return
            del self._kept[kept.read.epoch, kept.read.ids.start]
            self._bytes -= kept.held_bytes
        if kept.where is _Where.CACHE and not self._closed:
            self._loader.release(kept.runs)
        with self._lock:
            self._freed += 1
            self._finish(kept.block)

    def _finish(self, block: int) -> None:
        self._left[block] -= 1
        if not self._left[block]:
            del self._left[block]
        self._needed.notify()

    def _walk(self) -> None:
        try:
            for number, block in enumerate(self._plan):
                if not self._begin(number):
                    return
                for at, read in enumerate(block):
                    if at % _READS_AHEAD == 0:
                        self._ask_for_indexes(block[at : at + 2 * _READS_AHEAD])
                    kept = self._admit(number, read, self._loader.reader.runs(read.ids))
                    if kept is not None:
                        self._pool.submit(self._load, kept)
                with self._lock:
                    self._finish(number)
        except BaseException as error:
            self._fail(error)

    def _ask_for_indexes(self, reads: Sequence[Read]) -> None:
        """Load at once what the walk would have to wait for one after the other."""
        for read in reads:
            if not self._loader.reader.has_index(read.ids.start):
                self._single_pool.submit(self._loader.reader.place, read.ids.start)

    def _begin(self, block: int) -> bool:
        """Wait until a block is near enough to be fetched, or somebody needs it; False if the window was closed."""
        with self._lock:
            while not self._closed and len(self._left) >= _BLOCKS and not self._waiting:
                self._needed.wait()
            self._left[block] = 1  # until all of its reads are entered
            return not self._closed

    def _admit(self, block: int, read: Read, runs: Sequence[Run]) -> _Kept | None:
        """Wait for room for a read and enter it; None if there is nothing to load."""
        size, gaps = _num_bytes(runs), None
        while True:
            with self._lock:
                freed = self._freed
                if self._bytes + size <= self._room:
                    return self._enter(_Kept(read, block, read.uses, runs, _Where.MEMORY))
            # Not under the lock: the cache writes to a disk, and may wait for other processes.
            if (gaps := self._loader.reserve(runs)) is not None:
                return self._enter(_Kept(read, block, read.uses, runs, _Where.CACHE, gaps))
            with self._lock:
                if size > self._room:  # there will never be room
                    return self._enter(_Kept(read, block, read.uses, runs, _Where.STORE))
                self._full = True
                self._ask_for_singles(list(self._prepared))
                self._planned.notify_all()
                while not self._closed and self._freed == freed:
                    self._needed.wait()
                if self._closed:
                    return None

    def _enter(self, kept: _Kept) -> _Kept | None:
        """Enter a read, less what was used of it before; as one of single samples, if not enough is left of it."""
        given_up = False
        with self._lock:
            self._full = False
            keys = {(kept.read.epoch, sample_id) for sample_id in kept.read.ids}
            early = keys & self._early
            self._early -= early
            kept.uses -= len(early)
            if kept.uses < WORTH_WHOLE * len(kept.read.ids):
                given_up = kept.where is _Where.CACHE
                kept.where = _Where.STORE
            if kept.uses > 0:
                self._kept[kept.read.epoch, kept.read.ids.start] = kept
                self._left[kept.block] += 1
                self._bytes += kept.held_bytes
                self.peak_bytes = max(self.peak_bytes, self._bytes)
            if kept.where is _Where.STORE:
                kept.data.set_result([])
            self._ask_for_singles(keys & self._prepared)
            self._planned.notify_all()
        if given_up:
            self._loader.give_up(kept.gaps)
            self._loader.release(kept.runs)
        return None if kept.where is _Where.STORE else kept

    def _load(self, kept: _Kept) -> None:
        if not kept.data.set_running_or_notify_cancel():
            return
        try:
            if kept.uses <= 0:  # all of its samples were skipped
                self._loader.give_up(kept.gaps)
                kept.data.set_result([])
            elif kept.where is _Where.MEMORY:
                kept.data.set_result([self._loader.load(run) for run in kept.runs])
            else:
                self._loader.fill(kept.runs, kept.gaps)
                kept.data.set_result([])
        except BaseException as error:
            kept.data.set_exception(error)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._planned.notify_all()


def _num_bytes(runs: Sequence[Run]) -> int:
    return sum(run.num_bytes for run in runs)
