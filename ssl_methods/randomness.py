"""Random numbers without state: a hash of where they are used."""

from __future__ import annotations

import hashlib
import struct
from functools import cache

_KEY = struct.Struct("<4q")


def uniforms(seed: int, *, epoch: int, sample_id: int, view: int, count: int) -> list[float]:
    """Return `count` uniform numbers in [0, 1) that belong to one view of one sample in one epoch.

    They depend on the arguments alone: not on call order, process, worker or rank count. Number i stays the same when
    `count` grows. Resolution 2^-32; the hash is SHAKE128 of the four integers (64 bits each, little endian).
    """
    digest = hashlib.shake_128(_KEY.pack(seed, epoch, sample_id, view)).digest(4 * count)
    return [word * 2.0**-32 for word in _words(count).unpack(digest)]


@cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")
