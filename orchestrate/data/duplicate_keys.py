"""Keys that occur twice, found among billions: 64-bit hashes, sorted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from orchestrate.data.tar_problems import DUPLICATE, REPACK, SPLIT


def key_hash(key: str) -> int:
    """Hash a key to 64 bits, the same in every process."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class SeenKeys:
    """Notices keys that occur twice in one shard; remembers a hash for each, and the few kinds of samples."""

    def __init__(self) -> None:
        self._seen: dict[int, frozenset[str]] = {}
        self._kinds: dict[frozenset[str], frozenset[str]] = {}  # one object for all samples of the same extensions

    def meet(self, hashed: int, extensions: Iterable[str]) -> tuple[str, str]:
        """Note a sample by the hash of its key; return the kind of problem and details, both "" if there is none."""
        found = frozenset(extensions)
        found = self._kinds.setdefault(found, found)
        earlier = self._seen.get(hashed)
        self._seen[hashed] = found
        if earlier is None:
            return "", ""
        if earlier.isdisjoint(found):
            return SPLIT, f": other members of this key lie earlier in the shard, with other samples between; {REPACK}"
        return DUPLICATE, ": an earlier sample of the shard has it"


def repeated_keys(shards: Sequence[array[int]]) -> list[tuple[int, int]]:
    """Find keys that more than one shard has: (shard, sample) of each occurrence, but for the first of a key.

    A key that one shard has twice is not looked for. Takes 16 bytes a sample; among a billion keys, two different ones
    share a hash with a probability of 3 %.
    """
    hashes = [np.frombuffer(keys, dtype=np.uint64) for keys in shards]
    merged = np.concatenate([np.unique(keys) for keys in hashes]) if hashes else np.empty(0, np.uint64)
    merged.sort()
    repeated = np.unique(merged[1:][merged[1:] == merged[:-1]])
    if not len(repeated):
        return []
    found, met = list[tuple[int, int]](), set[int]()
    for number, keys in enumerate(hashes):
        found += _later_occurrences(number, keys, repeated, met)
    return found


def _later_occurrences(
    number: int, keys: npt.NDArray[np.uint64], repeated: npt.NDArray[np.uint64], met: set[int]
) -> list[tuple[int, int]]:
    samples = np.flatnonzero(np.isin(keys, repeated))
    found = [(number, int(sample)) for sample in samples if int(keys[sample]) in met]
    met.update(int(keys[sample]) for sample in samples)
    return found
