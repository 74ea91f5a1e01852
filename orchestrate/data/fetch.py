"""Many byte ranges at once: as many requests as the store takes well, within a budget of bytes in memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial

from orchestrate.data import storage
from orchestrate.data.retry import PATIENCE, Patience, ReadCounts, is_pushback, with_retries
from orchestrate.errors import DataError

_MERGED_BYTES = 16 << 20
_FIRST_LIMIT = 4
_HOLD_ROUNDS = 8  # rounds at one limit before the next probe upwards
_MEASURED = 200  # durations kept for the percentile
_LEAST_MEASURED = 20
_HEDGED_SHARE = 0.05  # of all requests, at most
_LEAST_HEDGE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` to `stop` (not included) of a file."""

    url: str
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Count the bytes."""
        return self.stop - self.start


def merge_ranges(
    ranges: Iterable[ByteRange], max_gap: int, *, max_bytes: int = _MERGED_BYTES
) -> list[tuple[ByteRange, list[ByteRange]]]:
    """Join neighbours of one file into one request, and say which ranges each request covers.

    Args:
        max_gap: bytes between two ranges that are cheaper to read than a second request.
        max_bytes: no request is joined beyond this length; a range that is longer alone stays whole.
    """
    merged: list[tuple[ByteRange, list[ByteRange]]] = []
    for wanted in sorted(ranges, key=lambda part: (part.url, part.start, part.stop)):
        if merged:
            joined, parts = merged[-1]
            whole = ByteRange(wanted.url, joined.start, max(joined.stop, wanted.stop))
            inside = wanted.stop <= joined.stop
            near = wanted.start <= joined.stop + max_gap and whole.length <= max_bytes
            if wanted.url == joined.url and (inside or near):
                merged[-1] = (whole, [*parts, wanted])
                continue
        merged.append((wanted, [wanted]))
    return merged


class Pace:
    """How many requests may run at once: up while that brings more bytes per second, halved when the store pushes back.

    A round is as many answers as two times the limit. If a round at a raised limit was not faster than the one
    before, the limit goes back and stays for some rounds. Rounds in which fewer requests were wanted than allowed say
    nothing. Not thread-safe; times are those of one monotonic clock in seconds.
    """

    def __init__(self, most: int) -> None:
        self.limit = min(_FIRST_LIMIT, most)
        self._most = most
        self._rate = 0.0
        self._raised_by = 0
        self._hold = 0
        self._last_cut = float("-inf")
        self._start_round(float("nan"))

    def was_reached(self) -> None:
        """Note that a request waits only for the limit."""
        self._reached = True

    def answered(self, num_bytes: int, now: float) -> None:
        """Note an answer."""
        if self._begin != self._begin:  # the first answer begins the first round
            self._start_round(now)
        self._bytes += num_bytes
        self._answers += 1
        if self._answers >= 2 * self.limit and now > self._begin:
            if self._reached:
                self._decide(self._bytes / (now - self._begin))
            self._start_round(now)

    def pushed_back(self, asked: float, now: float) -> None:
        """Halve the limit, once for all requests that were under way together: those asked before the last cut."""
        if asked <= self._last_cut:
            return
        self.limit = max(1, self.limit // 2)
        self._last_cut, self._raised_by, self._hold, self._rate = now, 0, _HOLD_ROUNDS, 0.0
        self._start_round(now)

    def _decide(self, rate: float) -> None:
        if self._raised_by and rate < 1.03 * self._rate:
            self.limit -= self._raised_by
            self._raised_by, self._hold = 0, _HOLD_ROUNDS
            return
        self._rate = rate
        self._hold = max(0, self._hold - 1)
        self._raised_by = 0 if self._hold else min(max(1, self.limit // 4), self._most - self.limit)
        self.limit += self._raised_by

    def _start_round(self, now: float) -> None:
        self._begin, self._bytes, self._answers, self._reached = now, 0, 0, False


@dataclass(eq=False, slots=True)
class _Job:
    wanted: ByteRange
    future: Future[bytes] = field(default_factory=Future)
    started: float = 0.0
    runners: int = 0
    hedged: bool = False
    settled: bool = False


class Fetcher:
    """Read byte ranges in threads, each whole and of the right length, or with an exception.

    Urgent ranges go first, others in the order of `submit`; a range that has to wait for bytes is not overtaken, and
    one that is larger than the whole budget runs alone. A range that takes much longer than nearly all others is asked
    for a second time, and the first answer counts (5 % of requests at most).
    """

    def __init__(self, *, max_bytes: int = 256 << 20, max_concurrency: int = 32, patience: Patience = PATIENCE) -> None:
        """Start nothing yet: threads start with the first ranges.

        Args:
            max_bytes: bytes asked for and not yet handed over.
            max_concurrency: requests at once, at most; it starts at 4 and follows the store.
        """
        self.counts = ReadCounts()
        self._patience = patience
        self._max_bytes, self._max_concurrency = max_bytes, max_concurrency
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._waiting: deque[_Job] = deque()
        self._running: dict[_Job, None] = {}
        self._num_runners = self._threads = self._bytes = 0
        self._pace = Pace(max_concurrency)
        self._durations: deque[float] = deque(maxlen=_MEASURED)
        self._closed = threading.Event()

    @property
    def concurrency(self) -> int:
        """Tell how many requests may run at once now."""
        return self._pace.limit

    def submit(self, wanted: ByteRange, *, urgent: bool = False) -> Future[bytes]:
        """Ask for a range. A future that is cancelled before its turn costs no request.

        The future raises what `storage.read` raises, or DataError where the file ends within the range.
        """
        job = _Job(wanted)
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("the fetcher is closed")
            (self._urgent if urgent else self._waiting).append(job)
            # One more than there are ranges: it watches for those that take too long.
            wanted_threads = self._num_runners + len(self._urgent) + len(self._waiting) + 1
            if self._threads < min(self._max_concurrency, wanted_threads):
                self._threads += 1
                threading.Thread(target=self._work, name="fetch", daemon=True).start()
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Ask for nothing more; what is not there yet ends with CancelledError. Returns at once."""
        with self._changed:
            self._closed.set()
            jobs = [*self._urgent, *self._waiting]
            started = list(self._running)
            self._urgent.clear()
            self._waiting.clear()
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()
        for job in started:
            self._settle(job, CancelledError())

    def _work(self) -> None:
        while (job := self._take()) is not None:
            begun = time.monotonic()
            try:
                outcome: bytes | BaseException = self._read(job)
            except BaseException as error:  # whatever it is, it belongs to the one who waits for the range
                outcome = error
            self._finish(job, begun, outcome)

    def _take(self) -> _Job | None:
        """Wait for a range whose turn it is; None when closed."""
        with self._changed:
            while not self._closed.is_set():
                now = time.monotonic()
                job = self._next_job() or self._overdue_job(now)
                if job is not None:
                    job.started = job.started or now
                    job.runners += 1
                    self._running[job] = None
                    self._num_runners += 1
                    self._bytes += job.wanted.length
                    self._changed.notify()  # the next thread looks whether there is more to do
                    return job
                self._changed.wait(self._seconds_to_overdue(now))
            return None

    def _next_job(self) -> _Job | None:
        for queue in (self._urgent, self._waiting):
            while queue:
                if not self._fits(queue[0]):
                    return None
                job = queue.popleft()
                if job.future.set_running_or_notify_cancel():
                    return job
        return None

    def _fits(self, job: _Job) -> bool:
        if self._num_runners and self._bytes + job.wanted.length > self._max_bytes:
            return False
        if self._num_runners >= self._pace.limit:
            self._pace.was_reached()
            return False
        return True

    def _overdue_job(self, now: float) -> _Job | None:
        """Find a range worth asking for twice."""
        due, job = self._next_hedge()
        if job is None or due > now:
            return None
        job.hedged = True
        self.counts.add(hedges=1)
        return job

    def _seconds_to_overdue(self, now: float) -> float | None:
        """Say when to look again; None: when something changes."""
        due, job = self._next_hedge()
        return None if job is None else max(0.0, due - now)

    def _next_hedge(self) -> tuple[float, _Job | None]:
        """Find the range that may be asked for twice next, and from when on: two 95th percentiles after its start."""
        counted = self.counts.snapshot()
        share = counted["hedges"] < _HEDGED_SHARE * counted["requests"]
        if len(self._durations) < _LEAST_MEASURED or self._num_runners >= self._pace.limit or not share:
            return 0.0, None
        after = max(_LEAST_HEDGE_SECONDS, 2 * sorted(self._durations)[int(0.95 * len(self._durations))])
        for job in self._running:  # the oldest first
            remote = storage.local_path(job.wanted.url) is None
            if remote and not job.hedged and self._bytes + job.wanted.length <= self._max_bytes:
                return job.started + after, job
        return 0.0, None

    def _read(self, job: _Job) -> bytes:
        wanted = job.wanted
        asked = [0.0]

        def once() -> bytes:
            asked[0] = time.monotonic()
            return storage.read_once(wanted.url, wanted.start, wanted.length, patience=self._patience)

        def note(error: BaseException) -> None:
            if is_pushback(error):
                with self._changed:
                    self._pace.pushed_back(asked[0], time.monotonic())

        data = with_retries(
            once,
            what=wanted.url,
            counts=self.counts,
            patience=self._patience,
            on_fault=note,
            sleep=partial(self._pause, job),
        )
        self.counts.add(bytes=len(data), wrong_length=len(data) != wanted.length)
        if len(data) != wanted.length:
            raise DataError(
                f"{wanted.url}: ends at byte {wanted.start + len(data):,}, the index has a sample up to "
                f"{wanted.stop:,}; copy the file again, or index the dataset again"
            )
        return data

    def _pause(self, job: _Job, seconds: float) -> None:
        """Wait before the next try, unless nobody needs it any more."""
        if self._closed.wait(seconds) or job.settled:
            raise CancelledError

    def _finish(self, job: _Job, begun: float, outcome: bytes | BaseException) -> None:
        with self._changed:
            now = time.monotonic()
            job.runners -= 1
            self._num_runners -= 1
            self._bytes -= job.wanted.length
            if not job.runners:
                del self._running[job]
            if isinstance(outcome, bytes):
                self._pace.answered(len(outcome), now)
                self._durations.append(now - begun)
            last = not job.runners
            self._changed.notify()
        if last or isinstance(outcome, bytes):
            self._settle(job, outcome)

    def _settle(self, job: _Job, outcome: bytes | BaseException) -> None:
        """Hand over the first outcome of a range; a later one of its second request is dropped."""
        with self._changed:
            if job.settled:
                return
            job.settled = True
        # Not under the lock: callbacks of the future may ask for more.
        if isinstance(outcome, bytes):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)
