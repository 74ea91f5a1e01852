"""Streams of a small dataset, for tests that compare them pixel by pixel."""

from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from orchestrate.data.index import Manifest, Shard, write_manifest
from orchestrate.data.order import Order
from orchestrate.data.reader import Reader
from orchestrate.data.run_loader import RunLoader, open_loader
from orchestrate.data.sample_source import Loading
from orchestrate.data.shards import pack_sample, write_shard
from orchestrate.data.stream import Batch, TrainStream
from orchestrate.data.window import Window
from ssl_methods.views import recipe

GLOBAL_BATCH = 12
VIEWS = recipe("simclr", 16)


def stream(url: str, *, workers: int = 0, loading: Loading | None = None, **options: Any) -> TrainStream:
    """Open a labelled stream of one rank unless told otherwise."""
    defaults = {"seed": 3, "global_batch": GLOBAL_BATCH, "rank": 0, "world_size": 1, "with_labels": True}
    return TrainStream(url, recipe=VIEWS, loading=loading or Loading(workers=workers), **(defaults | options))


def batches(url: str, num_steps: int, **options: Any) -> list[Batch]:
    with closing(stream(url, **options)) as opened:
        return list(islice(opened, num_steps))


def write_samples(folder: Path, url: str, sizes: Sequence[int], *, per_shard: int) -> str:
    """Write samples whose images are their id, repeated to about so many bytes, to fsspec's store in memory.

    Every fourth shard is followed by an empty one.
    """
    folder.mkdir(exist_ok=True, parents=True)
    shards: list[Shard] = []
    for first in range(0, len(sizes), per_shard):
        ids = range(first, min(first + per_shard, len(sizes)))
        samples = [pack_sample(f"k{n:06d}", {"png": b"%06d" % n * (1 + sizes[n] // 6)}) for n in ids]
        shards.append(write_shard(folder / f"t-{len(shards):06d}.tar", samples))
        if len(shards) % 5 == 4:
            shards.append(write_shard(folder / f"t-{len(shards):06d}.tar", []))
    write_manifest(folder, Manifest(tuple(shards)))
    files = [path for path in folder.iterdir() if path.suffix in (".tar", ".idx", ".json")]
    fsspec.filesystem("memory").pipe(
        {f"{url.removeprefix('memory://')}/{path.name}": path.read_bytes() for path in files}
    )
    return url


class Prefetch:
    """A rank's samples of `write_samples` step by step, without decoding; each is checked to be the one asked for."""

    def __init__(
        self, url: str, *, rank: int = 0, world_size: int = 1, batch: int = GLOBAL_BATCH, lanes: int | str = "auto",
        memory_bytes: int, cache: Path | None = None, cache_bytes: int = 0, skipped: Collection[int] = (),
        loader: RunLoader | None = None, batches_ahead: int = 3,
    ) -> None:  # fmt: skip
        reader = Reader(url)
        self.order = Order(reader.num_samples, 3, global_batch=batch, lanes=lanes)  # type: ignore[arg-type]
        self.loader = loader or open_loader(reader, cache, cache_bytes)
        self._place, self._skipped, self._step = (rank, world_size), skipped, 0
        self.seen: list[int] = []
        self._begun: deque[list[tuple[int, int]]] = deque()
        self._batches_ahead = batches_ahead
        place = {"rank": rank, "world_size": world_size, "start_step": 0}
        self.window = Window(self.loader, self.order, **place, memory_bytes=memory_bytes)

    def step(self, workers: int = 3) -> int:
        """Take a batch, and return the bytes held at its end."""
        while len(self._begun) < 1 + self._batches_ahead:
            ids, epochs = self.order.rank_slice(self._step + len(self._begun), *self._place)
            self._begun.append(list(zip(epochs.tolist(), ids.tolist(), strict=True)))
            self.window.prepare(key for key in self._begun[-1] if key[1] not in self._skipped)
        keys = self._begun.popleft()
        with ThreadPoolExecutor(workers) as pool:
            self.seen = [sample_id for sample_id in pool.map(self._take, keys) if sample_id >= 0]
        self._step += 1
        return self.window.held_bytes

    def _take(self, key: tuple[int, int]) -> int:
        if key[1] in self._skipped:
            self.window.skip(*key)
            return -1
        place, data = self.window.sample(*key)
        assert place.sample_id == key[1]
        assert self.loader.reader.problem(place, data) == ""
        return place.sample_id

    def close(self) -> None:
        self.window.close()
        self.loader.close()


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.sample_ids, expected.sample_ids)
    assert found.fingerprint == expected.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(found.views, expected.views, strict=True))
    assert found.labels is not None
    assert expected.labels is not None
    assert torch.equal(found.labels, expected.labels)


def joined(parts: list[Batch]) -> Batch:
    """Put the parts of all ranks together."""
    return Batch(
        np.concatenate([part.sample_ids for part in parts]),
        [torch.cat(same) for same in zip(*(part.views for part in parts), strict=True)],
        torch.cat([part.labels for part in parts]),
        parts[0].fingerprint,
    )


def flip(path: Path, place: int) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def byte_of_sample(url: Path, shard: str, index: int) -> int:
    """Find a byte within the image of a sample: past its first header."""
    lengths = np.fromfile(url / f"{shard}.idx", "<u4")[::2]
    return int(lengths[:index].sum()) + 512 * 2 + 100
