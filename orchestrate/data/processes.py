"""Manners of the threads and processes that a process starts: one core each, no signals, and an end with the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

# Schedulers and keyboards signal whole process groups; the parent decides what a request means.
_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def hold_signals() -> None:
    """Keep those signals from this thread, and from the processes that it starts before they can do so themselves."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)


def one_core_each() -> None:
    """Keep torch to one core in this thread: the threads are the parallelism."""
    import torch

    torch.set_num_threads(1)


def obey_parent() -> None:
    """Ignore signals that ask for a stop, and end as soon as the parent is gone."""
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the parent is gone, killed or not; a pool's processes would wait for ever
        os._exit(1)
