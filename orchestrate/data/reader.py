"""Samples of a dataset by id: where their bytes lie, and whether they are what the index says."""

from __future__ import annotations

import os
import threading
import zlib
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from orchestrate.data import storage
from orchestrate.data.images import DECODE_ERRORS, SUFFIXES, decode
from orchestrate.data.index import Shard, check_shards, load_manifest
from orchestrate.data.retry import ReadCounts
from orchestrate.data.shards import unpack_sample
from orchestrate.errors import DataError, StorageError

_EXTENSIONS = frozenset(suffix.lstrip(".") for suffix in SUFFIXES)
_CACHED_SIDECARS = 1024  # of 10,000 samples each: 120 MB at most


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


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring samples of one shard: bytes `start` to `stop` of shard `number`."""

    number: int
    start: int
    stop: int


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
        self._kept = sidecars
        self._sidecar = lru_cache(maxsize=_CACHED_SIDECARS)(self._load_sidecar)
        self._touched: set[int] = set()
        self.counts = ReadCounts()

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.manifest.num_samples

    @property
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
        offsets, checksums = self._sidecar(number)
        return Place(
            sample_id, number, shard, index, int(offsets[index]), int(offsets[index + 1]), int(checksums[index])
        )

    def runs(self, ids: range) -> list[Run]:
        """Find neighbouring samples: one run for each shard that they lie in."""
        runs, first = [], ids.start
        while first < ids.stop:
            number = self.number_of(first)
            end = self._ends[number]
            base = end - self.manifest.shards[number].samples
            stop = min(ids.stop, end)
            offsets = self._sidecar(number)[0]
            runs.append(Run(number, int(offsets[first - base]), int(offsets[stop - base])))
            first = stop
        return runs

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
            found = storage.info(url, counts=self.counts)
        except FileNotFoundError:
            raise DataError(f"{url}: missing; copy the dataset again, or index it anew as another one") from None
        if found.size != shard.bytes:
            return f"{found.size:,} bytes, the manifest says {shard.bytes:,}"
        if self.is_remote and shard.version and found.version and found.version != shard.version:
            return f"version {found.version}, the manifest says {shard.version}"
        return ""

    def fetch(self, place: Place) -> bytes:
        """Read the bytes of one sample from the store, unchecked.

        Raises:
            StorageError: the store does not answer.
            DataError: the shard is missing.
        """
        return self._fetch(self.manifest.shard_url(self.url, place.shard), place.start, place.stop)

    def fetch_run(self, run: Run) -> bytes:
        """Read the bytes of neighbouring samples from the store; see `fetch`."""
        return self._fetch(self.shard_url(run.number), run.start, run.stop)

    def _fetch(self, url: str, start: int, stop: int) -> bytes:
        try:
            return storage.read(url, start, stop - start, counts=self.counts)
        except FileNotFoundError:
            raise DataError(f"{url}: missing; copy the dataset again") from None
        except OSError as error:
            raise StorageError(f"{url}: cannot be read: {error.strerror or error}") from error

    def read(self, sample_id: int) -> RawSample:
        """Read and check one sample by itself. Raises DamagedSampleError, or DataError if it cannot be read."""
        place = self.place(sample_id)
        data = self.fetch(place)
        self.check(place, data)
        return self.unpack(place, data)

    def problem(self, place: Place, data: bytes | memoryview) -> str:
        """Say in what these bytes differ from the sample that was indexed; empty if in nothing."""
        if len(data) != place.stop - place.start:
            return f"{len(data):,} bytes where the index says {place.stop - place.start:,}: the shard ends within it"
        if zlib.crc32(data) != place.crc:
            return f"CRC32 is {zlib.crc32(data):08x}, the index says {place.crc:08x}: the shard is damaged"
        return ""

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

    def _load_sidecar(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Load a shard's sidecar as offsets of the samples' ranges (one more than samples) and their CRC32."""
        shard = self.manifest.shards[number]
        url = self.manifest.sidecar_url(self.url, shard)
        data = self._sidecar_bytes(url, shard)
        fix = "run `orchestrate data verify --repair`"
        if len(data) != 8 * shard.samples:
            raise DataError(f"{url}: {len(data):,} bytes for {shard.samples:,} samples, must be 8 each; {fix}")
        entries = np.frombuffer(data, dtype="<u4").reshape(-1, 2)
        offsets = np.zeros(len(entries) + 1, dtype=np.int64)
        np.cumsum(entries[:, 0], out=offsets[1:])
        if offsets[-1] > shard.bytes:
            raise DataError(f"{url}: does not fit its shard; {fix}")
        return offsets, entries[:, 1].copy()

    def _sidecar_bytes(self, url: str, shard: Shard) -> bytes:
        kept = self._kept / f"{shard.sha256}.idx" if self._kept is not None and self.is_remote else None
        if kept is not None and kept.exists():
            return kept.read_bytes()
        try:
            data = storage.read(url, counts=self.counts)
        except FileNotFoundError:
            raise DataError(f"{url}: missing; run `orchestrate data verify --repair`") from None
        if kept is not None and len(data) == 8 * shard.samples:
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}")  # ranks may write it at once
            aside.write_bytes(data)
            aside.replace(kept)
        return data


def _key_hint(damaged: bytes) -> str:
    """Guess the key from bytes that failed their checksum: most damage spares the header."""
    name = damaged[:100].split(b"\0")[0].decode("utf-8", "replace")
    return name.rpartition(".")[0]
