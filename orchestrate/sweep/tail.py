"""The ends of files, and what is added to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LOOK_EVERY_SECONDS = 0.3
_BYTES_PER_LINE = 512  # a first guess; more is read if it does not do


def last_lines(path: Path, count: int, *, up_to: int | None = None) -> list[str]:
    """Return the last lines of a file of any size, or of its first `up_to` bytes."""
    if count <= 0:
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) if up_to is None else up_to
        block = _BYTES_PER_LINE * count
        while True:
            start = max(0, size - block)
            file.seek(start)
            lines = file.read(size - start).decode(errors="replace").splitlines()
            if block >= size or len(lines) > count:
                return lines[-count:]
            block *= 2


@dataclass
class _Reader:
    """How far a file is read; `rest` is a line that has no end yet."""

    position: int
    rest: bytes = field(default=b"", repr=False)

    def lines(self, path: Path) -> list[bytes]:
        """Return the lines that were finished since the last look."""
        try:
            if path.stat().st_size <= self.position:
                return []
            with path.open("rb") as file:
                file.seek(self.position)
                text = file.read()
        except FileNotFoundError:
            return []
        self.position += len(text)
        *whole, self.rest = (self.rest + text).split(b"\n")
        return whole


def follow(
    find: Callable[[], Iterable[Path]],
    *,
    read_up_to: Mapping[Path, int],
    is_growing: Callable[[], bool],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[Path, str]]:
    """Yield the lines that are added to files, those of new files too, until nobody writes any more.

    Args:
        find: lists the files; new ones may come at any time.
        read_up_to: how many bytes of a file are known; all of one that is not named here is new.
        is_growing: tells whether somebody may still write.
        wait: pauses between looks.
    """
    readers = {path: _Reader(position) for path, position in read_up_to.items()}
    while True:
        growing = is_growing()  # asked before reading, so that the last words are not missed
        for path in find():
            reader = readers.setdefault(path, _Reader(0))
            for line in reader.lines(path):
                yield path, line.decode(errors="replace")
        if not growing:
            break
        wait(_LOOK_EVERY_SECONDS)
    for path, reader in readers.items():
        if reader.rest:
            yield path, reader.rest.decode(errors="replace")
