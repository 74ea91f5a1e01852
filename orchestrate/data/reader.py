"""Random access to the samples of a packed dataset: one verified byte range each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from orchestrate.data import storage
from orchestrate.data.images import DECODE_ERRORS, SUFFIXES, decode
from orchestrate.data.index import Shard, check_shards, load_manifest
from orchestrate.data.shards import unpack_sample
from orchestrate.errors import DataError

_EXTENSIONS = tuple(suffix.lstrip(".") for suffix in SUFFIXES)
_CACHED_SIDECARS = 1024  # of 10,000 samples each: 120 MB at most


@dataclass(frozen=True)
class Sample:
    """One sample; `label` is None in unlabelled data."""

    key: str
    image: Image.Image
    label: int | None


class Reader:
    """Read samples by id, in any order, from any number of threads.

    Ids count through the shards in manifest order. A range is read as a whole and checked by length and CRC32: decoders
    accept most damaged images without a word.
    """

    def __init__(self, url: str) -> None:
        """Load the manifest and check that all shards are there.

        Raises:
            DataError: the dataset is missing, empty or incomplete.
        """
        self.url = url
        self.manifest = load_manifest(url)
        check_shards(url, self.manifest)
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards])
        self._sidecar = lru_cache(maxsize=_CACHED_SIDECARS)(self._load_sidecar)

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.manifest.num_samples

    def read(self, sample_id: int) -> Sample:
        """Read, verify and decode a sample.

        Raises:
            DataError: it is damaged or cannot be read; names shard, sample and, where it can be told, key.
        """
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        shard = self.manifest.shards[number]
        index = sample_id - int(self._ends[number]) + shard.samples
        where = f"{storage.join(self.url, shard.name)}: sample {index} (id {sample_id})"
        data = self._verified_range(shard, number, index, where)
        try:
            key, members = unpack_sample(data)
        except ValueError as error:
            raise DataError(f"{where}: not laid out as a sample: {error}; pack the dataset again") from error
        return self._decode(key, members, f"{where}, key {key!r}")

    def _verified_range(self, shard: Shard, number: int, index: int, where: str) -> bytes:
        try:
            offsets, checksums = self._sidecar(number)
            start, end = int(offsets[index]), int(offsets[index + 1])
            data = storage.read(storage.join(self.url, shard.name), start, end - start)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
        if len(data) != end - start:
            raise DataError(f"{where}: the shard ends within it; copy or pack the dataset again")
        if zlib.crc32(data) != checksums[index]:
            raise DataError(
                f"{where}, {_key_hint(data)}: CRC32 is {zlib.crc32(data):08x}, the index says "
                f"{int(checksums[index]):08x}: the shard is damaged; copy or pack the dataset again"
            )
        return data

    def _load_sidecar(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Load a shard's sidecar as offsets of the samples' ranges (one more than samples) and their CRC32."""
        shard = self.manifest.shards[number]
        entries = np.frombuffer(storage.read(storage.join(self.url, shard.sidecar)), dtype="<u4").reshape(-1, 2)
        offsets = np.zeros(len(entries) + 1, dtype=np.int64)
        np.cumsum(entries[:, 0], out=offsets[1:])
        if len(entries) != shard.samples or offsets[-1] > shard.bytes:
            raise DataError(f"{storage.join(self.url, shard.sidecar)}: does not fit its shard; pack the dataset again")
        return offsets, entries[:, 1].copy()

    def _decode(self, key: str, members: dict[str, bytes], where: str) -> Sample:
        images = [extension for extension in members if extension in _EXTENSIONS]
        if len(images) != 1:
            raise DataError(f"{where}: {len(images)} images among its members {sorted(members)}, must be one")
        label = members.get("cls")
        if label is None and self.manifest.classes:
            raise DataError(f"{where}: no label, though the dataset has {self.manifest.num_classes} classes")
        try:
            return Sample(key, decode(members[images[0]]), None if label is None else int(label))
        except DECODE_ERRORS as error:
            raise DataError(f"{where}: cannot be decoded: {error}; pack the dataset again") from error


def _key_hint(damaged: bytes) -> str:
    """Guess the key from bytes that failed their checksum: most damage spares the header."""
    name = damaged[:100].split(b"\0")[0].decode("utf-8", "replace")
    return f"key {name.rpartition('.')[0]!r}"
