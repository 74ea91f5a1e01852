"""The same work on many shards at once, with progress in bytes and an end on the first failure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from orchestrate.data import storage

T = TypeVar("T")
R = TypeVar("R")
_REMOTE_WORKERS = 16  # a worker waits for its store most of the time
_REPORT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far the work is; `expected_bytes` is what all shards have if the rest is like those looked at."""

    shards: int
    num_shards: int
    bytes: int
    expected_bytes: int


def default_workers(url: str) -> int:
    """Choose threads: for local files the cores of this process, for a store more, since they wait."""
    return len(os.sched_getaffinity(0)) if storage.local_path(url) is not None else _REMOTE_WORKERS


class Meter:
    """Counts bytes of all workers, and tells them to stop."""

    def __init__(self, num_shards: int) -> None:
        self._lock = threading.Lock()
        self._num_shards, self._done = num_shards, 0
        self._bytes, self._sized, self._sizes = 0, 0, 0
        self._stopped = False

    def expect(self, num_bytes: int) -> None:
        """Note the size of a shard that is begun."""
        with self._lock:
            self._sized, self._sizes = self._sized + 1, self._sizes + num_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes read or found done already."""
        with self._lock:
            self._bytes += num_bytes

    def watch(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass pieces on and count them. Raises KeyboardInterrupt after `stop`."""
        for piece in pieces:
            if self._stopped:
                raise KeyboardInterrupt
            self.add(len(piece))
            yield piece

    def finish_shard(self) -> None:
        """Count a shard."""
        with self._lock:
            self._done += 1

    def stop(self) -> None:
        """Make all workers end at their next piece."""
        self._stopped = True

    def snapshot(self) -> ShardProgress:
        """Say how far the work is."""
        with self._lock:
            expected = round(self._sizes / self._sized * self._num_shards) if self._sized else 0
            return ShardProgress(self._done, self._num_shards, self._bytes, max(expected, self._bytes))


def work_on_shards(
    shards: Sequence[T],
    work: Callable[[T, Meter], R],
    *,
    workers: int,
    progress: Callable[[ShardProgress], None] | None = None,
) -> list[R]:
    """Call `work` on each shard, in threads: hashing, checksums and reading release the interpreter's lock.

    Raises:
        Exception: the first that `work` raised; the others stop at their next piece.
    """
    meter, tasks = Meter(len(shards)), iter(enumerate(shards))
    results: dict[int, R] = {}

    def one(number: int, shard: T) -> None:
        results[number] = work(shard, meter)
        meter.finish_shard()

    with ThreadPoolExecutor(workers, thread_name_prefix="shards") as pool:
        waiting: set[Future[None]] = set()
        try:
            # Few are submitted ahead: waiting for a hundred thousand futures is slow.
            while waiting or len(results) < len(shards):
                waiting |= {pool.submit(one, *task) for task in islice(tasks, 2 * workers - len(waiting))}
                done, waiting = wait(waiting, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if progress is not None:
                    progress(meter.snapshot())
        except BaseException:
            meter.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[number] for number in range(len(shards))]
