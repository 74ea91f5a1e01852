"""Batches of views for training, and of plain images for evaluation; the same for any number of ranks and workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from orchestrate.data.order import Order, fingerprint
from orchestrate.data.reader import Reader, Sample
from orchestrate.errors import DataError
from ssl_methods.views import ViewRecipe, eval_view, make_views

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A rank's part of the global batch of one step.

    Attributes:
        sample_ids: which samples, in the order of the rows.
        views: one tensor for each view of the recipe, not normalised.
        labels: None unless asked for.
        fingerprint: of the *global* batch's ids in order, so all ranks hold the same; see `order.fingerprint`.
    """

    sample_ids: npt.NDArray[np.int64]
    views: list[UInt8[Tensor, "batch _ _ 3"]]
    labels: Int64[Tensor, " batch"] | None
    fingerprint: str


class EvalBatch(NamedTuple):
    """Samples as they are, without augmentation; `labels` is None in unlabelled data."""

    sample_ids: npt.NDArray[np.int64]
    images: UInt8[Tensor, "batch size size 3"]
    labels: Int64[Tensor, " batch"] | None


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
        workers: int,
        start_step: int = 0,
        with_labels: bool = False,
    ) -> None:
        """Open the dataset; work starts with the first batch asked for.

        Args:
            url: folder of the packed dataset.
            recipe: the views to make.
            seed: of order and augmentation.
            global_batch: samples of a step over all ranks.
            rank, world_size: whose part.
            workers: threads that build batches ahead; 0 builds each when it is asked for.
            start_step: steps done before, by any number of ranks.
            with_labels: also give labels.

        Raises:
            DataError: the dataset is missing, incomplete, or has no labels where they are asked for.
            ValueError: the ranks do not divide the global batch.
        """
        self._reader = Reader(url)
        if with_labels and not self._reader.manifest.classes:
            raise DataError(f"{url}: has no labels, and the method needs them; pack a source with class folders")
        self.order = Order(self._reader.num_samples, seed, global_batch=global_batch)
        self._run = self.order.rank_run(rank, world_size)
        self._recipe, self._seed, self._with_labels = recipe, seed, with_labels
        self._batches = _Ahead(self._build, count(start_step), workers)

    def __next__(self) -> Batch:
        """Give the next batch.

        Raises:
            DataError: a sample is damaged; names shard and key.
            StopIteration: the stream was closed.
        """
        return next(self._batches)

    def close(self) -> None:
        """Stop the workers and wait for what they are at; safe to call twice."""
        self._batches.close()

    def _build(self, step: int) -> Batch:
        ids, epochs = self.order.batch(step)
        rows = list(zip(ids[self._run].tolist(), epochs[self._run].tolist(), strict=True))
        samples = [self._reader.read(sample_id) for sample_id, _ in rows]
        views = [
            make_views(sample.image, self._recipe, seed=self._seed, epoch=epoch, sample_id=sample_id)
            for sample, (sample_id, epoch) in zip(samples, rows, strict=True)
        ]
        return Batch(
            sample_ids=ids[self._run],
            views=[_stack(same_view) for same_view in zip(*views, strict=True)],
            labels=_labels(samples) if self._with_labels else None,
            fingerprint=fingerprint(ids),
        )


class EvalStream(Iterable[EvalBatch]):
    """Yield each sample of a dataset exactly once over all ranks, in order of id, resized and cropped.

    Ranks hold consecutive runs that differ by one sample at most; the last batch may be smaller. Each iteration starts
    anew.
    """

    def __init__(
        self, url: str, *, size: int, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> None:
        """Open the dataset.

        Args:
            url: folder of the packed dataset.
            size: side of the images, pixels.
            batch_size: samples of a batch of this rank.
            rank, world_size: whose part.
            workers: threads that build batches ahead.

        Raises:
            DataError: the dataset is missing or incomplete.
        """
        self._reader = Reader(url)
        self._size, self._workers = size, workers
        first, end = (self._reader.num_samples * number // world_size for number in (rank, rank + 1))
        self._runs = [range(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._runs)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Start from the first batch. Raises DataError at a damaged sample."""
        batches = _Ahead(self._build, self._runs, self._workers)
        try:
            yield from batches
        finally:
            batches.close()

    def _build(self, run: range) -> EvalBatch:
        samples = [self._reader.read(sample_id) for sample_id in run]
        images = _stack([eval_view(sample.image, self._size) for sample in samples])
        return EvalBatch(np.array(run), images, _labels(samples) if self._reader.manifest.classes else None)


class _Ahead(Iterator[T]):
    """Yield `build(task)` for each task, in order, built by threads a bounded number ahead.

    Threads suffice: reading, decoding and resizing release the interpreter's lock. They hold no random state.
    """

    def __init__(self, build: Callable[..., T], tasks: Iterable[object], workers: int) -> None:
        self._build, self._tasks = build, iter(tasks)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        # One batch being built by each worker, and as many ready.
        self._depth = 2 * workers
        self._pending: deque[Future[T]] = deque()

    def __next__(self) -> T:
        if self._pool is None:
            return self._build(next(self._tasks))
        for task in islice(self._tasks, self._depth - len(self._pending)):
            self._pending.append(self._pool.submit(self._build, task))
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def close(self) -> None:
        self._tasks = iter(())
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _stack(images: Iterable[npt.NDArray[np.uint8]]) -> UInt8[Tensor, "batch height width 3"]:
    return torch.from_numpy(np.stack(list(images)))


def _labels(samples: list[Sample]) -> Int64[Tensor, " batch"]:
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)
