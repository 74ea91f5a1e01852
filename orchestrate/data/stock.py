"""Samples as stock webdataset has them, in our order: its stages (decode, to_tuple, batched) run on this source."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from orchestrate.data.order import Order
from orchestrate.data.reader import Reader
from orchestrate.data.shards import unpack_sample

_FETCHES_AHEAD = 32


class ShardSource(IterableDataset[dict[str, Any]]):
    """Yield stock samples of an indexed dataset: `__key__`, `__url__`, and each member's bytes by its extension.

    They come in the order of training: that of `Order` with the same seed and global batch, each sample once an epoch,
    without end unless `num_steps` is given. `__sample_id__` and `__epoch__` say which and when. Give it to
    `webdataset.DataPipeline` in the place of shards, `tarfile_to_samples` and splitters:

        DataPipeline(ShardSource(url, global_batch=256), decode("rgb"), to_tuple("jpg", "cls"), batched(256))

    In a DataLoader worker `w` of `W` gives the steps `w, w + W, ...` whole. With `batched(global_batch // world_size)`
    in the pipeline and `batch_size=None` in the loader, batches come in the order of their steps for any `W`. Choose
    `multiprocessing_context="spawn"` for remote data, whose clients do not survive a fork.

    Remote samples are fetched one by one, 32 at a time; `TrainStream` reads longer ranges.
    """

    def __init__(
        self,
        url: str,
        *,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        """Open the dataset.

        Args:
            url: folder of the manifest.
            global_batch: samples of a step over all ranks; part of what fixes the order.
            seed: of the order.
            rank, world_size: whose part of each step.
            start_step: steps done before, by any number of ranks.
            num_steps: end after so many; None goes on for ever.

        Raises:
            DataError: the dataset is missing or incomplete.
            ValueError: the ranks do not divide the global batch.
        """
        super().__init__()
        self._reader = Reader(url)
        self._url, self._seed, self._global_batch = url, seed, global_batch
        self._run = self._order().rank_run(rank, world_size)
        self._start_step, self._num_steps = start_step, num_steps

    def _order(self) -> Order:
        return Order(self._reader.num_samples, self._seed, global_batch=self._global_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Start from the first step. Raises DataError at a damaged sample."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        wanted = self._wanted(first, stride)
        if not self._reader.is_remote:
            yield from (self._sample(*one) for one in wanted)
            return
        with ThreadPoolExecutor(_FETCHES_AHEAD, thread_name_prefix="stock") as pool:
            ahead: deque[Future[dict[str, Any]]] = deque()
            try:
                for one in wanted:
                    ahead.append(pool.submit(self._sample, *one))
                    if len(ahead) == _FETCHES_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the open dataset."""
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the dataset again."""
        vars(self).update(state, _reader=Reader(state["_url"]))

    def _wanted(self, first: int, stride: int) -> Iterator[tuple[int, int]]:
        order, stop = self._order(), self._num_steps
        for step in count(first, stride) if stop is None else range(first, stop, stride):
            ids, epochs = order.batch(self._start_step + step)
            yield from zip(ids[self._run].tolist(), epochs[self._run].tolist(), strict=True)

    def _sample(self, sample_id: int, epoch: int) -> dict[str, Any]:
        place = self._reader.place(sample_id)
        data = self._reader.fetch(place)
        if self._reader.problem(place, data):
            place, data = self._reader.settle(place, data)
        try:
            key, members = unpack_sample(data)
        except ValueError as error:
            raise self._reader.damaged(place, str(error), key="") from error
        shard_url = self._reader.manifest.shard_url(self._url, place.shard)
        return {"__key__": key, "__url__": shard_url, "__sample_id__": sample_id, "__epoch__": epoch, **members}
