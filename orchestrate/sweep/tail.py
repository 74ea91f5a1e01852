"""The end of a file, and what is added to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOK_EVERY_SECONDS = 0.3
_BYTES_PER_LINE = 512  # a first guess; more is read if it does not do


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a file of any size."""
    if count <= 0:
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        block = _BYTES_PER_LINE * count
        while True:
            file.seek(max(0, size - block))
            lines = file.read().decode(errors="replace").splitlines()
            if block >= size or len(lines) > count:
                return lines[-count:]
            block *= 2


def follow(
    path: Path, *, from_byte: int, is_growing: Callable[[], bool], wait: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Yield what is added to a file, until it no longer grows.

    Args:
        path: of the file.
        from_byte: where to begin.
        is_growing: tells whether somebody may still write.
        wait: pauses between looks.
    """
    with path.open("rb") as file:
        file.seek(from_byte)
        while True:
            growing = is_growing()  # asked before reading, so that the last words are not missed
            text = file.read().decode(errors="replace")
            if text:
                yield text
            if not growing:
                return
            wait(_LOOK_EVERY_SECONDS)
