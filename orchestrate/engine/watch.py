"""The in-job contract: stop requests, the hang watch and the heartbeat, all off the main thread.

A Python signal handler does not run while the main thread sits in a collective. `signal.set_wakeup_fd` does: the
interpreter's C handler writes the signal's number into a socket at once, and a thread reads it.
"""

import contextlib
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from orchestrate.exits import Exit

# Called with the exit code and the reason, from a thread, before a process is ended.
Leaving = Callable[[int, str], None]

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_LOOK_EVERY_SECONDS = 0.5
_LAST_WORDS_SECONDS = 5.0
_LOOK_FOR_HANGS_EVERY_SECONDS = 2.0
# A thread on a busy host wakes up late by less.
_LATE_SECONDS = 1.0


def dump_stacks(reason: str) -> None:
    """Write a sentence and the stacks of all threads to stderr."""
    print(f"{reason}; all stacks:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)


def ignore_leaving(code: int, reason: str) -> None:
    """Stand in where nobody wants to know why a process ends."""


def leave(code: Exit, reason: str, leaving: Leaving) -> NoReturn:
    """End the process at once, whatever its main thread does, and whether or not a disk takes the last words."""
    telling = threading.Thread(target=leaving, args=(code, reason), daemon=True)
    telling.start()
    telling.join(_LAST_WORDS_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopWatch:
    """Notice requests to stop, and end a process that does not follow one.

    A request is a signal, the RunDir's stop file if this rank looks for it, or the deadline. `requested` is then true;
    the trainer agrees with the other ranks, saves and leaves. If it has not called `obeyed` within `grace_seconds`, the
    stacks of all threads go to stderr and the process ends with exit code 86; or with 74, if it has waited for data for
    `data_grace_seconds`.
    """

    def __init__(
        self,
        stop_file: Path | None,
        *,
        deadline: float = float("inf"),
        grace_seconds: float = 120.0,
        data_grace_seconds: float = 30.0,
        leaving: Leaving = ignore_leaving,
    ) -> None:
        self._stop_file, self._deadline, self._grace_seconds = stop_file, deadline, grace_seconds
        self._data_grace_seconds, self._waits_since = data_grace_seconds, math.inf
        self.leaving = leaving
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_LOOK_EVERY_SECONDS)
        self._writer.setblocking(False)
        self._obeyed = threading.Event()
        self.requested = False
        self.reason = ""
        self.nothing_to_save = (
            False  # set while every result is already on disk: a request then ends the process at once
        )

    def start(self) -> None:
        """Take over the stop signals; call it from the main thread, before any other thread starts."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _do_nothing)
        # A forked child shares the socket, but its signals are not this process's. They wait until it has let go.
        os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget_signals)
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    def obeyed(self) -> None:
        """Tell the watch that the request is being followed and the process will end by itself."""
        self._obeyed.set()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Tell the watch that the process waits for a store, which may be silent for minutes."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = math.inf

    def _watch(self) -> None:
        while not self.requested:
            self.reason = self._find_request()
            self.requested = bool(self.reason)
        patience_ends = time.monotonic() + self._grace_seconds
        while not self._obeyed.wait(_LOOK_EVERY_SECONDS):
            if self.nothing_to_save:
                leave(Exit.CONTINUE, self.reason, self.leaving)
            if time.monotonic() >= patience_ends:
                self._end_as_hang()
            # The other ranks are in the step already: no state of this moment can be saved.
            if time.monotonic() - self._waits_since >= self._data_grace_seconds:
                waited = f"asked to stop ({self.reason}) after {self._data_grace_seconds:.0f} s of waiting for data"
                print(f"error: {waited}; the last checkpoint serves", file=sys.stderr, flush=True)
                leave(Exit.LATER, waited, self.leaving)

    def _end_as_hang(self) -> None:
        reason = f"asked to stop ({self.reason}), but no step ended for {self._grace_seconds:.0f} s"
        dump_stacks(reason)
        leave(Exit.HANG, reason, self.leaving)

    def _find_request(self) -> str:
        with contextlib.suppress(TimeoutError):
            for number in self._reader.recv(64):
                if number in STOP_SIGNALS:
                    return signal.Signals(number).name
        if self._stop_file is not None and self._stop_file.exists():
            return "stop file"
        return "deadline" if time.time() >= self._deadline else ""


def _do_nothing(number: int, frame: Any) -> None:
    """Stand in for the default action, which would end the process."""


def _hold_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _forget_signals() -> None:
    # Only the main thread may touch handlers; a child of another thread has just that one, so it is the main thread.
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _release_signals()


class HangWatch:
    """End a process in which no step ends any more.

    Every rank runs one, so that the stacks of all ranks land in their logs: the one that sits elsewhere than the others
    is the culprit. Nobody is asked and nothing is saved; the last checkpoint serves. The watch needs the interpreter's
    lock, which a thread that waits in a collective, a stream or a system call has given back.

    A scheduler may suspend a job for hours, while the clock goes on. The watch wakes up often, and does not count the
    time by which it was late.
    """

    def __init__(
        self,
        limit_seconds: float,
        *,
        dump: Callable[[str], None] = dump_stacks,
        leaving: Leaving = ignore_leaving,
    ) -> None:
        """Prepare a watch.

        Args:
            limit_seconds: longest time from `start` to the first step, and between two steps.
            dump: shows the stacks of all threads below a sentence.
            leaving: is told why the process ends.
        """
        self._limit_seconds, self._dump, self._leaving = limit_seconds, dump, leaving
        self._num_steps, self._last = 0, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def start(self) -> None:
        """Begin to count; what comes before the first step, as compiling, counts too."""
        self._last = time.monotonic()
        self._thread.start()

    def stepped(self) -> None:
        """Begin to count anew: a step, or other work that is known to be long, has ended."""
        self._num_steps += 1
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        every = min(_LOOK_FOR_HANGS_EVERY_SECONDS, self._limit_seconds / 4)
        woke, asked = time.monotonic(), every
        while not self._closed.wait(asked):
            before, woke = woke, time.monotonic()
            late = woke - before - asked
            if late > _LATE_SECONDS:
                self._last = min(woke, self._last + late)
            left = self._last + self._limit_seconds - woke
            # To the moment, as all ranks do: the first that ends breaks the collective in which the others wait.
            asked = min(every, left)
            if left <= 0:
                reason = self._reason()
                self._dump(reason)
                leave(Exit.HANG, reason, self._leaving)

    def _reason(self) -> str:
        began = time.time() - (time.monotonic() - self._last)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
        since = f"the last of {self._num_steps} ended" if self._num_steps else "none since the watch began"
        return f"no step ended for {self._limit_seconds:g} s, {since} at {clock}"


class Heartbeat:
    """Write the newest facts to files every few seconds, also while a step is long.

    Attributes:
        every_seconds: time between two writes; readers call a heartbeat stale after several of them.
    """

    every_seconds = 5.0

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write
        self._facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin writing."""
        self._thread.start()

    def update(self, **facts: Any) -> None:
        """Change some facts; they are written with the next beat."""
        with self._lock:
            self._facts.update(facts)

    def beat(self) -> None:
        """Write now."""
        with self._lock:
            self._write({**self._facts, "time": time.time()})

    def close(self) -> None:
        """Write a last time and stop; once is enough."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self.beat()

    def _run(self) -> None:
        while not self._stop.wait(self.every_seconds):
            # A full disk must not end the training; the next beat tries again.
            with contextlib.suppress(OSError):
                self.beat()
