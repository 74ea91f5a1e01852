"""Where samples come from: straight from files, or fetched ahead from a store; checked, and read twice if wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrate.config.train import SystemConfig
from orchestrate.data.order import Order
from orchestrate.data.reader import Damage, Place, RawSample, Reader, Run

if TYPE_CHECKING:
    from orchestrate.data.window import RunLoader, Window


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
    """Give the samples of a rank's plan by id, from any number of threads."""

    def __init__(
        self, reader: Reader, order: Order, loading: Loading, *, rank: int, world_size: int, start_step: int
    ) -> None:
        """Open the source. Remote data are fetched from now on, in the order in which the rank needs them."""
        self.reader = reader
        self.reread = 0  # samples whose bytes were wrong at first
        self._loader: RunLoader | None = None
        self._window: Window | None = None
        if loading.ahead == "always" or (loading.ahead == "remote" and reader.is_remote):
            from orchestrate.data.window import Window, open_loader

            self._loader = open_loader(reader, loading.cache, loading.cache_bytes)
            place = {"rank": rank, "world_size": world_size, "start_step": start_step}
            self._window = Window(self._loader, order, **place, memory_bytes=loading.memory_bytes)

    def read(self, epoch: int, sample_id: int, *, planned: bool) -> RawSample:
        """Read a sample and check it; what is wrong is read again from the store before it is called damaged.

        Args:
            epoch, sample_id: which sample, and when.
            planned: it is the one that the order names, not a substitute.

        Raises:
            DamagedSampleError: it is wrong twice.
            StorageError: the store does not answer.
            DataError: its shard is missing or was changed.
        """
        place = self.reader.place(sample_id)
        data = self._bytes(epoch, place, planned)
        if self.reader.problem(place, data):
            self.reread += 1
            data = self._loader.load_again(place) if self._loader is not None else self.reader.fetch(place)
            if self.reader.problem(place, data):
                self.reader.check_unchanged(place.number)
                self.reader.check(place, data)
        return self.reader.unpack(place, data)

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
        window = {"single_reads": self._window.single_reads, "peak_bytes": self._window.peak_bytes}
        return {**facts, **self._loader.facts(), **{name: float(value) for name, value in window.items()}}

    def close(self) -> None:
        """Stop fetching."""
        if self._window is not None:
            self._window.close()
        if self._loader is not None:
            self._loader.close()

    def _bytes(self, epoch: int, place: Place, planned: bool) -> bytes | memoryview:
        if self._window is not None and planned:
            return self._window.sample(epoch, place)
        return self.reader.fetch(place) if self._loader is None else self._loader.load_sample(place)


class BulkSource:
    """Give runs of neighbouring samples, each once, from any number of threads."""

    def __init__(self, reader: Reader, loading: Loading) -> None:
        self._reader = reader
        self._loader: RunLoader | None = None
        if reader.is_remote:
            from orchestrate.data.window import open_loader

            self._loader = open_loader(reader, loading.cache, loading.cache_bytes)

    def read(self, ids: range) -> Iterator[Callable[[], RawSample]]:
        """Read neighbouring samples; each is checked, and given or refused, when its function is called.

        Raises:
            DamagedSampleError: one is wrong twice; raised by its function.
            StorageError: the store does not answer.
            DataError: a shard is missing or was changed.
        """
        runs = {run.number: (run, self._load(run)) for run in self._reader.runs(ids)}
        for sample_id in ids:
            yield partial(self._sample, sample_id, *runs[self._reader.number_of(sample_id)])

    def _sample(self, sample_id: int, run: Run, data: bytes) -> RawSample:
        place = self._reader.place(sample_id)
        piece: bytes | memoryview = memoryview(data)[place.start - run.start : place.stop - run.start]
        if self._reader.problem(place, piece):
            piece = self._reader.fetch(place) if self._loader is None else self._loader.load_again(place)
            self._reader.check(place, piece)
        return self._reader.unpack(place, piece)

    def close(self) -> None:
        """Stop fetching."""
        if self._loader is not None:
            self._loader.close()

    def _load(self, run: Run) -> bytes:
        return self._reader.fetch_run(run) if self._loader is None else self._loader.load(run)
