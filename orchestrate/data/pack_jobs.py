"""Write the shards of a pack, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrate.data.images import check_image
from orchestrate.data.index import Shard
from orchestrate.data.pack_shrink import Shrink
from orchestrate.data.pack_sources import Item
from orchestrate.data.processes import obey_parent
from orchestrate.data.shards import pack_sample, recover_shard, write_shard
from orchestrate.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One shard to write; plain data, so that it can go to another process."""

    path: Path
    items: Sequence[Item]
    read_members: Callable[[Item], dict[str, bytes]]
    label: dict[str, int]
    skip_bad: bool
    shrink: Shrink | None = None


@dataclass(frozen=True)
class Written:
    """What came of a job: the shard, or no shard where bad images are not to be skipped."""

    shard: Shard | None
    class_counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


class _BadImagesError(Exception):
    """Abandon a shard: its bad images are listed by the job, and none are to be skipped."""


def run_jobs(folder: Path, jobs: list[Job], workers: int, progress: Progress) -> list[Written]:
    """Write shards, in processes where there are several; see `pack` for what `progress` is called with.

    Raises:
        DataError: the disk is full or a process died; run again to go on.
    """
    total = sum(len(job.items) for job in jobs)
    progress(0, total)
    try:
        if min(workers, len(jobs)) > 1:
            return _run_processes(jobs, min(workers, len(jobs)), lambda done: progress(done, total))
        return _run_inline(jobs, lambda done: progress(done, total))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}; run again to go on from here") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a packing process died (out of memory, or the calling script has no file or no "
            "`if __name__ == '__main__'`); run again with fewer workers to go on from here"
        ) from error


def _run_inline(jobs: list[Job], progress: Callable[[int], None]) -> list[Written]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            progress(done)

    results = [_write(job, count) for job in jobs]
    progress(sum(len(job.items) for job in jobs))
    return results


def _run_processes(jobs: list[Job], workers: int, progress: Callable[[int], None]) -> list[Written]:
    # Spawned, not forked: the caller may run threads (torch does), whose locks a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (counter, stop)) as pool:
        futures = [pool.submit(_write_in_worker, job) for job in jobs]
        try:
            _follow(futures, lambda: progress(counter.value))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _follow(futures: list[Future[Written]], report: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        report()


# A pool hands shared counters to its processes only through an initializer, and that only through a global.
_worker: dict[str, Any] = {}


def _start_worker(counter: Any, stop: Any) -> None:
    obey_parent()
    _worker.update(counter=counter, stop=stop)


def _write_in_worker(job: Job) -> Written:
    def count() -> None:
        if _worker["stop"].is_set():
            raise KeyboardInterrupt
        with _worker["counter"].get_lock():
            _worker["counter"].value += 1

    return _write(job, count)


def _write(job: Job, count: Callable[[], None]) -> Written:
    """Write one shard, unless an earlier run did; `count` is called after each image."""
    recovered = recover_shard(job.path)
    if recovered is not None and recovered.samples == len(job.items):
        for _ in job.items:
            count()
        return Written(recovered, Counter(item.class_name for item in job.items))
    bad: list[str] = []
    class_counts: Counter[str] = Counter()
    try:
        return Written(write_shard(job.path, _samples(job, bad, class_counts, count)), class_counts, bad)
    except _BadImagesError:
        return Written(None, bad=bad)


def _samples(job: Job, bad: list[str], class_counts: Counter[str], count: Callable[[], None]) -> Iterator[bytes]:
    for item in job.items:
        problem, members = _read_checked(job, item)
        count()
        if problem is not None:
            bad.append(f"{item.where}: {problem}")
        elif job.skip_bad or not bad:
            class_counts[item.class_name] += 1
            label = {"cls": str(job.label[item.class_name]).encode()} if item.class_name else {}
            yield pack_sample(item.key, members | label)
    if bad and not job.skip_bad:
        raise _BadImagesError


def _read_checked(job: Job, item: Item) -> tuple[str | None, dict[str, bytes]]:
    """Read the members of a sample; say what is wrong with its image, or shrink it if that is asked for."""
    try:
        members = job.read_members(item)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}", {}
    problem = check_image(members[item.extension])
    if problem is None and job.shrink is not None:
        smaller = job.shrink(members[item.extension])
        if smaller is not None:
            del members[item.extension]
            members["jpg"] = smaller
    return problem, members
