"""Samples of a dataset by id: where their bytes lie, and whether they are what the index says."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from orchestrate.data import storage
from orchestrate.data.closable_calls import ClosableCalls
from orchestrate.data.images import DECODE_ERRORS, SUFFIXES, decode
from orchestrate.data.index import Shard, check_shards, load_manifest
from orchestrate.data.retry import ReadCounts
from orchestrate.data.shards import unpack_sample
from orchestrate.data.sidecars import Sidecars
from orchestrate.data.tar_headers import split_name
from orchestrate.errors import DataError, StorageError

_EXTENSIONS = frozenset(suffix.lstrip(".") for suffix in SUFFIXES)
_TRIES = 6  # for a sample that is wrong, and each time in another way
_PAUSE_SECONDS = 0.05  # before the second of these, twice as long before the third, ...
_MORE_BYTES = 512  # are asked for at each of these tries: no proxy in between can answer with what it kept

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies: bytes `start` to `stop` of shard `number`, in which it is sample `index`."""

    sample_id: int
    number: int
    shard: Shard
    index: int
    start: int
    stop: int
    crc: int


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbouring samples of one shard: bytes `start` to `stop` of shard `number`, of which the first is its `index`.

    Knows where each sample lies, so that the index of the shard is not needed again.
    """

    number: int
    shard: Shard
    ids: range
    index: int
    offsets: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]

    @property
    def start(self) -> int:
        """The first byte."""
        return int(self.offsets[0])

    @property
    def stop(self) -> int:
        """The byte behind the last one."""
        return int(self.offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Count the bytes."""
        return self.stop - self.start

    def part(self, sample_id: int) -> slice:
        """Say which part of the run's bytes one of the samples is."""
        at = sample_id - self.ids.start
        start, stop = self.offsets[at : at + 2].tolist()
        return slice(start - self.start, stop - self.start)

    def place(self, sample_id: int) -> Place:
        """Find one of the samples."""
        at = sample_id - self.ids.start
        start, stop = self.offsets[at : at + 2].tolist()
        return Place(sample_id, self.number, self.shard, self.index + at, start, stop, int(self.checksums[at]))


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample whose image is not decoded; `label` is None in unlabelled data."""

    key: str
    image: bytes
    label: int | None


@dataclass(frozen=True, slots=True)
class Damage:
    """A sample that cannot be used, and why; `key` is empty where it cannot be told."""

    sample_id: int
    shard: str
    index: int
    key: str
    reason: str

    def __str__(self) -> str:
        """Name shard, sample, key and reason."""
        key = f", key {self.key!r}" if self.key else ""
        return f"{self.shard}: sample {self.index} (id {self.sample_id}){key}: {self.reason}"

    def as_facts(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class DamagedSampleError(DataError):
    """Name one sample that cannot be used; training puts another one in its place."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(f"{damage}; `orchestrate data verify` lists all such samples; copy or pack the dataset again")
        self.damage = damage

    def __reduce__(self) -> Any:
        """Go through a pipe between processes."""
        return type(self), (self.damage,)


class Reader:
    """Find and check samples by id, from any number of threads.

    Ids count through the shards in manifest order. A range is read as a whole and checked by length and CRC32: decoders
    accept most damaged images without a word.
    """

    def __init__(self, url: str, *, sidecars: Path | None = None) -> None:
        """Load the manifest; of local data, also check that all shards are there.

        Args:
            url: folder of the manifest.
            sidecars: local folder that keeps sidecars of remote shards.

        Raises:
            DataError: the dataset is missing, empty or incomplete.
        """
        self.url = url
        self.manifest = load_manifest(url)
        check_shards(url, self.manifest)
        self._ends = list(accumulate(shard.samples for shard in self.manifest.shards))
        self._folder = sidecars
        self._touched: set[int] = set()
        self.counts = ReadCounts()
        self._open()

    def reopened(self) -> Reader:
        """Return a reader of the same data that is closed by itself."""
        twin = copy(self)
        twin._open()
        return twin

    def close(self) -> None:
        """End at once what waits for a store, in any thread, with CancelledError; nothing is read any more."""
        self._calls.close()

    def _open(self) -> None:
        self._calls = ClosableCalls()
        self._sidecars = Sidecars(
            self.url,
            self.manifest,
            read=self._read_sidecar,
            pause=self._calls.pause,
            folder=self._folder if self.is_remote else None,
        )

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.manifest.num_samples

    @cached_property
    def is_remote(self) -> bool:
        """Whether the shards lie in an object store or behind HTTP."""
        return storage.local_path(self.manifest.base or self.url) is None

    @property
    def has_labels(self) -> bool:
        """Whether samples have labels."""
        return bool(self.manifest.classes)

    def number_of(self, sample_id: int) -> int:
        """Find the shard of a sample, by its place in the manifest."""
        return bisect_right(self._ends, sample_id)

    def place(self, sample_id: int) -> Place:
        """Find a sample. Raises DataError if its sidecar is missing or damaged."""
        number = self.number_of(sample_id)
        shard = self.manifest.shards[number]
        index = sample_id - self._ends[number] + shard.samples
        offsets, checksums = self._sidecars.get(number)
        return Place(
            sample_id, number, shard, index, int(offsets[index]), int(offsets[index + 1]), int(checksums[index])
        )

    def runs(self, ids: range) -> list[Run]:
        """Find neighbouring samples: one run for each shard that they lie in. Raises as `place` does."""
        runs, first = [], ids.start
        while first < ids.stop:
            number = self.number_of(first)
            shard, end = self.manifest.shards[number], self._ends[number]
            stop, index = min(ids.stop, end), first - end + shard.samples
            last = index + stop - first
            offsets, checksums = self._sidecars.get(number)
            # Copied: a view would keep the index of the whole shard in memory.
            places = offsets[index : last + 1].copy(), checksums[index:last].copy()
            runs.append(Run(number, shard, range(first, stop), index, *places))
            first = stop
        return runs

    def has_index(self, sample_id: int) -> bool:
        """Tell whether `place` needs no store."""
        return self._sidecars.is_at_hand(self.number_of(sample_id))

    def num_bytes(self, ids: range) -> int:
        """Estimate the bytes of neighbouring samples without their sidecars, from the mean of their shard."""
        shard = self.manifest.shards[self.number_of(ids.start)]
        return shard.bytes * len(ids) // shard.samples

    def shard_url(self, number: int) -> str:
        """Name a shard's tar."""
        return self.manifest.shard_url(self.url, self.manifest.shards[number])

    def touch(self, number: int) -> None:
        """Check once that a remote shard is still the one that was indexed.

        Raises:
            DataError: it is missing, or has another size or version (ETag).
        """
        if number in self._touched or not self.is_remote:
            return
        self.check_unchanged(number)
        self._touched.add(number)

    def check_unchanged(self, number: int) -> None:
        """Compare a shard's size and version with the manifest, twice if need be. Raises DataError if they differ."""
        if self._difference(number) and (difference := self._difference(number)):
            fix = "the shard was changed after it was indexed; restore it, or index the dataset anew as another one"
            raise DataError(f"{self.shard_url(number)}: {difference}: {fix}")

    def _difference(self, number: int) -> str:
        shard, url = self.manifest.shards[number], self.shard_url(number)
        try:
            found = self._call(partial(storage.info, url, counts=self.counts))
        except FileNotFoundError:
            raise DataError(f"{url}: missing; copy the dataset again, or index it anew as another one") from None
        if found.size != shard.bytes:
            return f"{found.size:,} bytes, the manifest says {shard.bytes:,}"
        if self.is_remote and storage.versions_differ(found.version, shard.version):
            return f"version {found.version}, the manifest says {shard.version}"
        return ""

    def fetch(self, place: Place, *, more_bytes: int = 0) -> bytes:
        """Read the bytes of one sample from the store, unchecked.

        Args:
            place: where it lies.
            more_bytes: to ask for beyond its end, and to drop.

        Raises:
            StorageError: the store does not answer.
            DataError: the shard is missing.
        """
        length = place.stop - place.start
        stop = min(place.stop + more_bytes, max(place.stop, place.shard.bytes))
        return self._fetch(self.manifest.shard_url(self.url, place.shard), place.start, stop)[:length]

    def fetch_run(self, run: Run) -> bytes:
        """Read the bytes of neighbouring samples from the store; see `fetch`."""
        return self._fetch(self.shard_url(run.number), run.start, run.stop)

    def _fetch(self, url: str, start: int, stop: int) -> bytes:
        try:
            return self._call(partial(storage.read, url, start, stop - start, counts=self.counts))
        except FileNotFoundError:
            raise DataError(f"{url}: missing; copy the dataset again") from None
        except OSError as error:
            raise StorageError(f"{url}: cannot be read: {error.strerror or error}") from error

    def _read_sidecar(self, url: str) -> bytes:
        return self._call(partial(storage.read, url, counts=self.counts))

    def _call(self, call: Callable[[], T]) -> T:
        return self._calls.run(call) if self.is_remote else call()

    def read(self, sample_id: int) -> RawSample:
        """Read and check one sample by itself. Raises DamagedSampleError, or DataError if it cannot be read."""
        place = self.place(sample_id)
        data = self.fetch(place)
        if self.problem(place, data):
            place, data = self.settle(place, data)
        return self.unpack(place, data)

    def problem(self, place: Place, data: bytes | memoryview) -> str:
        """Say in what these bytes differ from the sample that was indexed; empty if in nothing."""
        if len(data) != place.stop - place.start:
            return f"{len(data):,} bytes where the index says {place.stop - place.start:,}: the shard ends within it"
        if zlib.crc32(data) != place.crc:
            return f"CRC32 is {zlib.crc32(data):08x}, the index says {place.crc:08x}: the shard is damaged"
        return ""

    def settle(self, place: Place, data: bytes | memoryview) -> tuple[Place, bytes]:
        """Read a sample whose bytes are wrong until they are right, or until two reads agree that it is damaged.

        Raises:
            DamagedSampleError: two reads gave the same wrong bytes: so will all others.
            StorageError: each read gave other bytes, or the store does not answer.
            DataError: the shard is missing or was changed.
        """
        self._sidecars.confirm(place.number)
        confirmed = self.place(place.sample_id)
        seen = {_mark(data)} if confirmed == place else set()
        for attempt in range(_TRIES):
            if attempt:
                self._calls.pause(_PAUSE_SECONDS * 2 ** (attempt - 1))
            again = self.fetch(confirmed, more_bytes=(attempt + 1) * _MORE_BYTES)
            if not self.problem(confirmed, again):
                return confirmed, again
            if _mark(again) in seen:
                self.check_unchanged(place.number)
                self.check(confirmed, again)
            seen.add(_mark(again))
        raise StorageError(
            f"{self.shard_url(place.number)}: sample {confirmed.index} (id {place.sample_id}): other wrong bytes at "
            "each read; check the store and the network, then start again"
        )

    def check(self, place: Place, data: bytes | memoryview) -> None:
        """Raise DamagedSampleError if the bytes of a sample are not those that were indexed."""
        reason = self.problem(place, data)
        if reason:
            raise self.damaged(place, reason, key=_key_hint(bytes(data[:512])))

    def unpack(self, place: Place, data: bytes | memoryview) -> RawSample:
        """Find image and label in the bytes of a sample. Raises DamagedSampleError."""
        try:
            key, members = unpack_sample(bytes(data))
        except ValueError as error:
            raise self.damaged(place, f"not laid out as a sample: {error}", key=_key_hint(bytes(data[:512]))) from error
        images = [extension for extension in members if extension in _EXTENSIONS]
        if len(images) != 1:
            reason = f"{len(images)} images among its members {sorted(members)}, must be one"
            raise self.damaged(place, reason, key=key)
        return RawSample(key, members[images[0]], self._label(place, key, members.get("cls")))

    def decode(self, place: Place, raw: RawSample) -> UInt8[np.ndarray, "h w c"]:
        """Decode the image of a sample. Raises DamagedSampleError."""
        try:
            return decode(raw.image)
        except DECODE_ERRORS as error:
            raise self.damaged(place, f"cannot be decoded: {error}", key=raw.key) from error

    def damaged(self, place: Place, reason: str, *, key: str) -> DamagedSampleError:
        """Make the error that names a sample."""
        url = self.manifest.shard_url(self.url, place.shard)
        return DamagedSampleError(Damage(place.sample_id, url, place.index, key, reason))

    def _label(self, place: Place, key: str, text: bytes | None) -> int | None:
        if not self.has_labels:
            return None
        if text is None:
            num_classes = self.manifest.num_classes
            raise self.damaged(place, f"no label, though the dataset has {num_classes} classes", key=key)
        try:
            label = int(text)
        except ValueError:
            raise self.damaged(place, f"its label {text[:20]!r} is no number", key=key) from None
        if not 0 <= label < self.manifest.num_classes:
            raise self.damaged(place, f"label {label}, classes are 0 to {self.manifest.num_classes - 1}", key=key)
        return label


def _mark(data: bytes | memoryview) -> tuple[int, int]:
    return len(data), zlib.crc32(data)


def _key_hint(damaged: bytes) -> str:
    """Guess the key from bytes that failed their checksum: most damage spares the header."""
    name = damaged[:100].split(b"\0")[0].decode("utf-8", "replace")
    split = split_name(name)
    return split[0] if split else ""
