"""Which processes are alive: each locks a file of its own, and the kernel drops the lock with the process.

That holds after SIGKILL and across containers, which number their processes apart. Locks work on disks of one node;
over most network file systems they do not.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LivingProcess:
    """Be alive in a folder under a name never used before, until `close` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Lock a file in the folder."""
        self.name = uuid.uuid4().hex
        self._path = folder / self.name
        # Renamed when locked: seen unlocked, it would be taken for the file of a dead process.
        aside = folder / f".{self.name}"
        self._descriptor = _lock(aside)
        aside.replace(self._path)

    def close(self) -> None:
        """Be gone."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_alive(folder: Path, name: str) -> bool:
    """Tell whether the process of a name still runs."""
    try:
        descriptor = os.open(folder / name, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def known_names(folder: Path) -> set[str]:
    """List all names, of the living and of those killed before they could clear theirs."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def forget_name(folder: Path, name: str) -> None:
    """Clear the file of a dead process."""
    (folder / name).unlink(missing_ok=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this node run the block at a time."""
    descriptor = _lock(path)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
