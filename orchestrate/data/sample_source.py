"""Where samples come from: straight from files, or fetched ahead from a store; checked, and read twice if wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrate.config.train import SystemConfig
from orchestrate.data.order import Order
from orchestrate.data.reader import Damage, Place, RawSample, Reader, Run

if TYPE_CHECKING:
    from orchestrate.data.run_loader import RunLoader
    from orchestrate.data.window import Window


@dataclass(frozen=True)
class Loading:
    """How samples become batches; changes how fast that goes, never what comes out.

    Attributes:
        workers: threads (or processes) that build batches ahead; 0 builds each when it is asked for.
        in_processes: decode and augment in processes, for transforms that hold the interpreter's lock.
        ahead: fetch what comes next in long ranges: `remote` only from object stores, or `always`, or `never`.
        memory_bytes: of samples fetched ahead, a rank.
        cache: folder on a local disk for what was fetched, shared by the ranks of a node.
        cache_bytes: that it may hold.
        pinned: give batches in page-locked memory.
    """

    workers: int = 0
    in_processes: bool = False
    ahead: Literal["remote", "always", "never"] = "remote"
    memory_bytes: int = 4 << 30
    cache: Path | None = None
    cache_bytes: int = 100 << 30
    pinned: bool = False

    @staticmethod
    def of(system: SystemConfig, *, pinned: bool = False) -> Loading:
        """Read the settings of a trial."""
        return Loading(
            workers=system.workers,
            in_processes=system.loader == "processes",
            ahead=system.read_ahead,
            memory_bytes=int(system.data_memory_gb * 1e9),
            cache=Path(system.cache).expanduser() if system.cache else None,
            cache_bytes=int(system.cache_gb * 1e9),
            pinned=pinned,
        )


class Source:
    """Give the samples of a rank's plan by id, from any number of threads.

    Attributes:
        advice: a sentence for the user if not all that should be fetched ahead has room; empty if it has.
        reread: samples whose bytes were wrong at first.
    """

    def __init__(
        self, reader: Reader, order: Order, loading: Loading, *, rank: int, world_size: int, start_step: int
    ) -> None:
        """Open the source. Remote data are fetched from now on, in the order in which the rank needs them."""
        self.reader = reader
        self.advice = ""
        self.reread = 0
        self._counting = threading.Lock()
        self._loader: RunLoader | None = None
        self._window: Window | None = None
        if loading.ahead == "always" or (loading.ahead == "remote" and reader.is_remote):
            from orchestrate.data.run_loader import open_loader
            from orchestrate.data.window import Window

            self.advice = _advice(reader, order, loading, world_size)
            self._loader = open_loader(reader, loading.cache, loading.cache_bytes)
            place = {"rank": rank, "world_size": world_size, "start_step": start_step}
            self._window = Window(self._loader, order, **place, memory_bytes=loading.memory_bytes)

    def read(self, epoch: int, sample_id: int, *, planned: bool) -> RawSample:
        """Read a sample and check it; what is wrong is read again from the store before it is called damaged.

        Args:
            epoch, sample_id: which sample, and when.
            planned: it is the one that the order names, not a substitute.

        Raises:
            DamagedSampleError: it is wrong, and the same at each read.
            StorageError: the store does not answer, or with other wrong bytes at each read.
            DataError: its shard is missing or was changed.
        """
        place, data = self._bytes(epoch, sample_id, planned)
        if self.reader.problem(place, data):
            with self._counting:
                self.reread += 1
            place, data = (self._loader or self.reader).settle(place, data)
        return self.reader.unpack(place, data)

    def prepare(self, epochs: Iterable[int], sample_ids: Iterable[int]) -> None:
        """Say which samples will be read soon, for those that were not fetched ahead; returns at once."""
        if self._window is not None:
            self._window.prepare(zip(epochs, sample_ids, strict=True))

    def skip(self, epoch: int, sample_id: int) -> None:
        """Say that a sample of the plan will not be read."""
        if self._window is not None:
            self._window.skip(epoch, sample_id)

    def damage(self, sample_id: int, key: str, reason: str) -> Damage:
        """Describe a sample that could not be decoded."""
        return self.reader.damaged(self.reader.place(sample_id), reason, key=key).damage

    def facts(self) -> dict[str, float]:
        """Count what was read again, and from a store also what was fetched and how often that failed."""
        facts = {"reread_samples": float(self.reread)}
        if self._loader is None or self._window is None:
            return facts
        return {**facts, **self._loader.facts(), "peak_bytes": float(self._window.peak_bytes)}

    def close(self) -> None:
        """Stop fetching; whoever waits for a sample gets CancelledError."""
        if self._window is not None:
            self._window.close()
        (self._loader or self.reader).close()
        if self._window is not None:
            self._window.join()

    def _bytes(self, epoch: int, sample_id: int, planned: bool) -> tuple[Place, bytes | memoryview]:
        if self._window is not None and planned:
            return self._window.sample(epoch, sample_id)
        place = self.reader.place(sample_id)
        return place, self.reader.fetch(place) if self._loader is None else self._loader.load_sample(place)


class BulkSource:
    """Give runs of neighbouring samples, each once, from any number of threads."""

    def __init__(self, reader: Reader, loading: Loading) -> None:
        self._reader = reader
        self._loader: RunLoader | None = None
        if reader.is_remote:
            from orchestrate.data.run_loader import open_loader

            self._loader = open_loader(reader, loading.cache, loading.cache_bytes)

    def read(self, ids: range) -> Iterator[Callable[[], RawSample]]:
        """Read neighbouring samples; each is checked, and given or refused, when its function is called.

        Raises:
            DamagedSampleError: one is wrong twice; raised by its function.
            StorageError: the store does not answer.
            DataError: a shard is missing or was changed.
        """
        for run in self._reader.runs(ids):
            data = self._load(run)
            for sample_id in run.ids:
                yield partial(self._sample, run.place(sample_id), memoryview(data)[run.part(sample_id)])

    def _sample(self, place: Place, data: bytes | memoryview) -> RawSample:
        if self._reader.problem(place, data):
            place, data = (self._loader or self._reader).settle(place, data)
        return self._reader.unpack(place, data)

    def close(self) -> None:
        """Stop fetching; whoever waits for a sample gets CancelledError."""
        (self._loader or self._reader).close()

    def _load(self, run: Run) -> bytes:
        return self._reader.fetch_run(run) if self._loader is None else self._loader.load(run)


def _advice(reader: Reader, order: Order, loading: Loading, world_size: int) -> str:
    """Compare what a rank should fetch ahead with the room for it; see `Source.advice`."""
    total = sum(shard.bytes for shard in reader.manifest.shards)
    # One block of the order is in use while the next one is on its way.
    wanted = 2 * total * min(order.lanes * order.window * order.chunk, order.num_samples) // order.num_samples
    wanted //= world_size
    allowed = loading.memory_bytes + (loading.cache_bytes if loading.cache is not None else 0)
    if wanted <= allowed:
        return ""
    fix = "raise system.cache_gb" if loading.cache is not None else "set system.cache to a folder on a local disk"
    return (
        f"{reader.url}: {wanted / 1e9:.3g} GB of samples should be fetched ahead by each rank, there is room for "
        f"{allowed / 1e9:.3g} GB: the others are read one by one, which is slower; raise system.data_memory_gb "
        f"(now {loading.memory_bytes / 1e9:.3g}) or {fix}"
    )
