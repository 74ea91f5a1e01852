"""Calls to a store that may hang: whoever waits for one can be sent home."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")


class ClosableCalls:
    """Wait for calls that run in threads of their own, until `close` ends all waits at once.

    A call that was left goes on until it ends by itself, in a daemon thread; its result is dropped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waited_for: set[Future[Any]] = set()

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns, or raise what it raises; CancelledError once closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed.is_set():
                raise CancelledError
            self._waited_for.add(future)
        try:
            threading.Thread(target=_work, args=(call, future), name="store call", daemon=True).start()
            return future.result()
        finally:
            with self._lock:
                self._waited_for.discard(future)

    def pause(self, seconds: float) -> None:
        """Wait. Raises CancelledError once closed."""
        if self._closed.wait(seconds):
            raise CancelledError

    def close(self) -> None:
        """End all waits, those to come too; safe to call twice."""
        with self._lock:
            self._closed.set()
            waited_for = list(self._waited_for)
        for future in waited_for:
            future.cancel()


def _work(call: Callable[[], T], future: Future[T]) -> None:
    try:
        result = call()
    except BaseException as error:  # whatever it is, it belongs to the one who waits
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
        return
    if future.set_running_or_notify_cancel():
        future.set_result(result)
