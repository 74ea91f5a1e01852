"""Batches of views for training; the same for any number of ranks and workers, and after any resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from orchestrate.data.order import Order, fingerprint
from orchestrate.data.processes import hold_signals, one_core_each
from orchestrate.data.reader import Damage, DamagedSampleError, RawSample, Reader
from orchestrate.data.sample_source import Loading, Source
from orchestrate.data.view_maker import Job, Maker, Pixels, Rows, make_in_process, start_process
from orchestrate.errors import DataError, LoaderError
from ssl_methods.views import ViewRecipe

_ROWS_PER_TASK = 16  # decoded at once by one worker: enough to make its overhead small
_SUBSTITUTES = 256  # tried in place of one damaged sample


@dataclass(frozen=True)
class Batch:
    """A rank's part of the global batch of one step.

    Attributes:
        sample_ids: which samples the order names, in the order of the rows.
        views: one tensor for each view of the recipe, not normalised.
        parameters: what `finish_views` has yet to apply to each view; empty unless `pixels` is `device`.
        labels: None unless asked for.
        fingerprint: of the *global* batch's ids in order, so all ranks hold the same; see `order.fingerprint`.
        damaged: samples found unusable that no batch before told of; others stand in their rows.
        substituted: rows in which others stand, also for samples that were known before.
    """

    sample_ids: npt.NDArray[np.int64]
    views: list[UInt8[Tensor, "batch _ _ 3"]]
    labels: Int64[Tensor, " batch"] | None
    fingerprint: str
    parameters: list[Float32[Tensor, "batch _"]] = field(default_factory=list)
    damaged: tuple[Damage, ...] = ()
    substituted: int = 0


class TrainStream(Iterator[Batch]):
    """Yield a rank's batches from a step on, without end.

    A batch depends on the dataset's contents, the seed, the global batch and the recipe alone: not on when the stream
    was started, on the workers, nor (end to end over ranks) on the number of ranks. Only the step has to be saved.
    """

    def __init__(
        self,
        url: str,
        *,
        recipe: ViewRecipe,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        with_labels: bool = False,
        pixels: Pixels = "fast",
        transform: str = "",
        quarantined: Collection[int] = (),
        loading: Loading = Loading(),  # noqa: B008 (frozen)
    ) -> None:
        """Open the dataset and begin to fetch; decoding starts with the first batch asked for.

        Args:
            url: folder of the manifest.
            recipe: the views to make.
            seed: of order and augmentation.
            global_batch: samples of a step over all ranks.
            rank, world_size: whose part.
            start_step: steps done before, by any number of ranks.
            with_labels: also give labels.
            pixels: how views are made; see `Maker`.
            transform: `module:function` of the user, run on decoded images; or empty.
            quarantined: ids of samples that are known to be unusable.
            loading: threads, processes, memory, cache.

        Raises:
            DataError: the dataset is missing, incomplete, or has no labels where they are asked for.
            ConfigError: the transform cannot be imported.
            ValueError: the ranks do not divide the global batch.
        """
        reader = Reader(url, sidecars=loading.cache / "sidecars" if loading.cache else None)
        if with_labels and not reader.has_labels:
            raise DataError(f"{url}: has no labels, and the method needs them; pack a source with class folders")
        self.order = Order(reader.num_samples, seed, global_batch=global_batch)
        self._run = self.order.rank_run(rank, world_size)
        self._maker = Maker(recipe, seed, pixels, transform)
        _ = self._maker.function  # fails here rather than in a worker
        self.source = Source(reader, self.order, loading, rank=rank, world_size=world_size, start_step=start_step)
        self._with_labels, self._loading = with_labels, loading
        self._quarantined = set(quarantined)
        self._found: dict[int, Damage] = {}  # in this stream, by sample id
        self._reported: set[int] = set()  # of these, by batches that were given out
        self._retries = 0.0
        self._steps, self._pending, self._closed = count(start_step), deque[_Pending](), False
        self._threads, self._processes = _pools(loading, self._maker)

    def __next__(self) -> Batch:
        """Give the next batch.

        Raises:
            StorageError: the store does not answer: go on later.
            DataError: a shard is missing or was changed, or all neighbours of a sample are unusable.
            StopIteration: the stream was closed.
            CancelledError: the stream was closed by another thread meanwhile.
        """
        if self._closed:
            raise StopIteration
        tasks = -(-self._rows // _ROWS_PER_TASK)
        # Enough tasks to keep all workers busy while a batch waits to be taken, and at least one batch beyond.
        depth = 2 + 2 * self._loading.workers // tasks if self._threads else 1
        try:
            while len(self._pending) < depth:
                self._pending.append(self._start(next(self._steps)))
            return self._pending.popleft().finish()
        except Exception as error:
            if not self._closed:
                raise
            # Which of the pools, the plan and the store was found closed first depends on who was faster.
            raise CancelledError from error

    def new_retries(self) -> float:
        """Count what was asked for again since the last call: failed and lagging requests, samples that were wrong."""
        facts, before = self.source.facts(), self._retries
        self._retries = facts["reread_samples"] + facts.get("retries", 0.0) + facts.get("hedges", 0.0)
        return self._retries - before

    def close(self) -> None:
        """Stop the workers and wait for what they are at; safe to call twice."""
        self._closed = True
        for pending in list(self._pending):  # which a taker in another thread may still add to
            pending.cancel()
        self._pending.clear()
        self.source.close()
        for pool in (self._threads, self._processes):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _rows(self) -> int:
        return int(self._run.stop - self._run.start)

    def _start(self, step: int) -> _Pending:
        ids, epochs = self.order.batch(step)
        shared = self._processes is not None
        pending = _Pending(
            ids[self._run],
            epochs[self._run],
            Rows.allocate(self._maker, self._rows, pinned=self._loading.pinned and not shared, shared=shared),
            np.zeros(self._rows, dtype=np.int64) if self._with_labels else None,
            fingerprint(ids),
            self._loading.pinned and shared,
            self._reported,
        )
        self.source.prepare(pending.epochs.tolist(), pending.sample_ids.tolist())
        for start in range(0, self._rows, _ROWS_PER_TASK):
            task = partial(self._fill, pending, range(start, min(start + _ROWS_PER_TASK, self._rows)))
            pending.tasks.append(_submit(self._threads, task))
        return pending

    def _fill(self, pending: _Pending, rows: range) -> list[Damage]:
        """Fill rows of a batch, and put neighbours in the place of samples that cannot be used."""
        damaged: list[Damage] = []
        attempts = dict.fromkeys(rows, 0)
        while attempts:
            chosen = {row: self._choose(pending, row, attempt, damaged) for row, attempt in attempts.items()}
            jobs = [
                Job(row, one.raw.image, int(pending.epochs[row]), int(pending.sample_ids[row]))
                for row, one in chosen.items()
            ]
            failures = dict(self._make(jobs, pending.rows))
            for row, one in chosen.items():
                if row in failures:
                    damaged.append(self._quarantine(self.source.damage(one.sample_id, one.raw.key, failures[row])))
                elif pending.labels is not None and one.raw.label is not None:
                    pending.labels[row] = one.raw.label
                pending.substituted[row] |= one.attempt > 0
            attempts = {row: chosen[row].attempt + 1 for row in failures}
        return damaged

    def _choose(self, pending: _Pending, row: int, attempt: int, damaged: list[Damage]) -> _Chosen:
        """Read the sample of a row, or the first of its substitutes from `attempt` on whose bytes are whole."""
        wanted, epoch = int(pending.sample_ids[row]), int(pending.epochs[row])
        for number in range(attempt, _SUBSTITUTES):
            sample_id = wanted if number == 0 else self.order.substitute(epoch, wanted, number)
            if sample_id in self._quarantined:
                # Found by another batch, maybe a later one: whichever of them is given out first reports it.
                damaged += [self._found[sample_id]] if sample_id in self._found else []
                if number == 0:
                    self.source.skip(epoch, sample_id)
                continue
            try:
                return _Chosen(number, sample_id, self.source.read(epoch, sample_id, planned=number == 0))
            except DamagedSampleError as error:
                damaged.append(self._quarantine(error.damage))
        url = self.source.reader.url
        raise DataError(f"{url}: sample {wanted} and {_SUBSTITUTES} neighbours are damaged; copy the dataset again")

    def _quarantine(self, damage: Damage) -> Damage:
        self._found[damage.sample_id] = damage
        self._quarantined.add(damage.sample_id)
        return damage

    def _make(self, jobs: list[Job], rows: Rows) -> list[tuple[int, str]]:
        if self._processes is None:
            return self._maker.make(jobs, rows)
        try:
            return self._processes.submit(make_in_process, jobs, rows).result()
        except BrokenProcessPool as error:
            raise LoaderError(
                "a process that makes views died, of want of memory or by a signal; go on with fewer system.workers"
            ) from error


class _Chosen(NamedTuple):
    """The sample that fills a row: itself (attempt 0) or a substitute."""

    attempt: int
    sample_id: int
    raw: RawSample


class _Pending:
    """A batch that is being filled."""

    def __init__(
        self,
        sample_ids: npt.NDArray[np.int64],
        epochs: npt.NDArray[np.int64],
        rows: Rows,
        labels: npt.NDArray[np.int64] | None,
        fingerprint: str,
        pin: bool,
        reported: set[int],
    ) -> None:
        self.sample_ids, self.epochs, self.rows, self.labels = sample_ids, epochs, rows, labels
        self.tasks: list[Future[list[Damage]]] = []
        self.substituted = np.zeros(len(sample_ids), dtype=bool)
        self._fingerprint, self._pin, self._reported = fingerprint, pin, reported

    def finish(self) -> Batch:
        """Wait until all rows are there."""
        found = {damage.sample_id: damage for task in self.tasks for damage in task.result()}
        damaged = [damage for sample_id, damage in found.items() if sample_id not in self._reported]
        self._reported.update(found)
        views, parameters = self.rows.views, self.rows.parameters
        if self._pin:  # memory shared with processes is not page-locked
            views, parameters = ([each.pin_memory() for each in tensors] for tensors in (views, parameters))
        labels = None if self.labels is None else torch.from_numpy(self.labels)
        return Batch(
            self.sample_ids,
            views,
            labels,
            self._fingerprint,
            parameters,
            tuple(damaged),
            int(self.substituted.sum()),
        )

    def cancel(self) -> None:
        """Drop the tasks that were not begun."""
        for task in self.tasks:
            task.cancel()


def _pools(loading: Loading, maker: Maker) -> tuple[ThreadPoolExecutor | None, ProcessPoolExecutor | None]:
    """Start the workers: threads that do all, or threads that read and processes that make the views."""
    if not loading.workers:
        return None, None
    if not loading.in_processes:
        return ThreadPoolExecutor(loading.workers, "loader", initializer=one_core_each), None
    # Spawned, not forked: threads of object stores and of torch hold locks that a fork would copy in any state.
    context = torch.multiprocessing.get_context("spawn")
    processes = ProcessPoolExecutor(loading.workers, context, start_process, (maker,))
    return ThreadPoolExecutor(2 * loading.workers, "loader", initializer=hold_signals), processes


def _submit(pool: ThreadPoolExecutor | None, task: Callable[[], list[Damage]]) -> Future[list[Damage]]:
    if pool is not None:
        return pool.submit(task)
    done: Future[list[Damage]] = Future()
    done.set_result(task())
    return done
