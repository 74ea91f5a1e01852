"""Plain images for evaluation: each sample exactly once over all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from orchestrate.data.processes import one_core_each
from orchestrate.data.reader import DamagedSampleError, Reader
from orchestrate.data.sample_source import BulkSource, Loading
from ssl_methods.views import eval_view


class EvalBatch(NamedTuple):
    """Samples as they are, without augmentation; `labels` is None in unlabelled data."""

    sample_ids: npt.NDArray[np.int64]
    images: UInt8[Tensor, "batch size size 3"]
    labels: Int64[Tensor, " batch"] | None


class EvalStream(Iterable[EvalBatch]):
    """Yield each sample of a dataset exactly once over all ranks, in order of id, resized and cropped.

    Ranks hold consecutive runs that differ by one sample at most; the last batch may be smaller. Each iteration starts
    anew. Nothing stands in for a damaged sample: it is an error, or it is left out.
    """

    def __init__(
        self,
        url: str,
        *,
        size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        damaged: Literal["refuse", "leave out"] = "refuse",
        loading: Loading = Loading(),  # noqa: B008 (frozen)
    ) -> None:
        """Open the dataset.

        Args:
            url: folder of the manifest.
            size: side of the images, pixels.
            batch_size: samples of a batch of this rank.
            rank, world_size: whose part.
            damaged: what to do with a damaged sample.
            loading: threads that build batches ahead, cache.

        Raises:
            DataError: the dataset is missing or incomplete.
        """
        self._reader = Reader(url, sidecars=loading.cache / "sidecars" if loading.cache else None)
        self._size, self._loading, self._leave_out = size, loading, damaged == "leave out"
        first, end = (self._reader.num_samples * number // world_size for number in (rank, rank + 1))
        self._runs = [range(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._runs)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Start from the first batch.

        Raises:
            DamagedSampleError: a sample is damaged, and none is to be left out.
            StorageError: the store does not answer.
        """
        reader = self._reader.reopened()
        source = BulkSource(reader, self._loading)
        with ThreadPoolExecutor(max(self._loading.workers, 1), "evaluation", one_core_each) as pool:
            pending: deque[Future[EvalBatch]] = deque()
            runs = iter(self._runs)
            try:
                while True:
                    ahead = 2 * self._loading.workers + 1 - len(pending)
                    pending.extend(pool.submit(self._build, source, run) for run in islice(runs, ahead))
                    if not pending:
                        return
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                source.close()  # before the pool is waited for: a store may never answer

    def _build(self, source: BulkSource, ids: range) -> EvalBatch:
        images = torch.empty((len(ids), self._size, self._size, 3), dtype=torch.uint8)
        labels = torch.zeros(len(ids), dtype=torch.int64) if self._reader.has_labels else None
        whole = np.ones(len(ids), dtype=bool)
        for row, sample in enumerate(source.read(ids)):
            try:
                raw = sample()
                eval_view(self._reader.decode(self._reader.place(ids[row]), raw), self._size, out=images[row].numpy())
            except DamagedSampleError:
                if not self._leave_out:
                    raise
                whole[row] = False
                continue
            if labels is not None and raw.label is not None:
                labels[row] = raw.label
        return EvalBatch(np.array(ids)[whole], images[whole], None if labels is None else labels[whole])
