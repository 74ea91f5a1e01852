"""One controller for a sweep: whoever holds the lease acts, all others read."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrate.errors import StoreError


class LeaseHeldError(StoreError):
    """Say which process controls the sweep."""


@contextmanager
def lease(sweep_dir: Path) -> Iterator[None]:
    """Hold the lease of a sweep; it is free again when the process ends, however it ends.

    Raises:
        LeaseHeldError: another process holds it.
    """
    sweep_dir.mkdir(parents=True, exist_ok=True)
    path = sweep_dir / "lease.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseHeldError(
                f"{sweep_dir.name}: {_holder(path)} controls this sweep; this command only reads"
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, file)
        file.flush()
        yield


def lease_holder(sweep_dir: Path) -> str:
    """Say which process controls a sweep; empty if none does."""
    path = sweep_dir / "lease.lock"
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return ""
    except BlockingIOError:
        return _holder(path)
    return ""


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
    return f"process {facts['pid']} on {facts['host']} (since {since})"
