"""What to do when a store does not answer: try again what may pass, and say at once what will not.

Stores fail through many libraries (aiohttp, botocore, s3fs, gcsfs, sockets). `classify` sorts their errors without
importing them, by HTTP status, by error code of S3 and by type, along the chain of causes.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from orchestrate.errors import DataError, OrchestrateError, StorageError

T = TypeVar("T")


class Fault(StrEnum):
    """Why a request failed: only a transient fault is worth another try."""

    TRANSIENT = "transient"
    MISSING = "missing"
    FORBIDDEN = "forbidden"
    FATAL = "fatal"


class ShortReadError(OSError):
    """Fewer bytes came than were asked for, though the object goes on."""


class MissingObjectError(DataError, FileNotFoundError):
    """Say which object is not there; a FileNotFoundError too, for callers that expect one."""


class ForbiddenObjectError(DataError, PermissionError):
    """Say which object may not be read or written."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store.

    A request is cut when no byte comes for `stall_seconds`, or when as a whole it is slower than
    `least_bytes_per_second`. The pause before try n + 1 is uniform in [0, `first_pause_seconds` * 2^(n - 1)], at most
    `longest_pause_seconds` (full jitter: thousands of ranks that failed together do not come back together).
    """

    attempts: int = 30
    budget_seconds: float = 300.0
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 20.0
    connect_seconds: float = 10.0
    stall_seconds: float = 20.0
    least_bytes_per_second: float = 128 << 10

    def request_seconds(self, num_bytes: int) -> float:
        """Bound a whole request, retries not included."""
        return self.connect_seconds + self.stall_seconds + num_bytes / self.least_bytes_per_second

    def longest_pause(self, tries: int) -> float:
        """Bound the pause after so many tries."""
        return min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** min(tries - 1, 60))


# A whole fleet may be told to wait longer: STORE_PATIENCE_SECONDS in the cluster config's environment.
PATIENCE = Patience(budget_seconds=float(os.environ.get("STORE_PATIENCE_SECONDS", "300")))


class ReadCounts:
    """What was asked of the stores, summed over threads; all counts only grow.

    requests: tries of any kind; retries: those after a fault; pushbacks: answers 429 and 503, and timeouts;
    wrong_length: answers that were not as long as asked; bytes: received; seconds: in requests, summed over threads.
    """

    names = ("requests", "retries", "pushbacks", "wrong_length", "hedges", "bytes", "seconds")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(self.names, 0.0)

    def add(self, **amounts: float) -> None:
        """Add to some counts at once."""
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    def snapshot(self) -> dict[str, float]:
        """Copy all counts."""
        with self._lock:
            return dict(self._totals)


def with_retries(
    call: Callable[[], T],
    *,
    what: str,
    counts: ReadCounts,
    patience: Patience = PATIENCE,
    on_fault: Callable[[BaseException], None] = lambda error: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> T:
    """Call until it works, a fault will not pass, or the budget is spent.

    Args:
        what: the URL, for messages.
        counts: every try and every retry is counted here.
        on_fault: called with each transient error before the pause.

    Raises:
        StorageError: the store failed for all tries or all of the budget; the run can go on later.
        MissingObjectError, ForbiddenObjectError: at once.
        DataError: refused for another reason, at once.
    """
    begin = clock()
    tries = 0
    while True:
        tries += 1
        started = clock()
        try:
            return call()
        except OrchestrateError:
            raise
        except Exception as error:
            fault = classify(error)
            if fault is not Fault.TRANSIENT:
                raise _lasting_error(error, fault, what) from error
            counts.add(pushbacks=is_pushback(error), wrong_length=isinstance(error, ShortReadError))
            on_fault(error)
            pause = max(jitter() * patience.longest_pause(tries), _asked_pause(error, patience))
            spent = clock() - begin
            if tries >= patience.attempts or spent + pause > patience.budget_seconds:
                raise StorageError(
                    f"{what}: no good answer (asked {tries} times in {spent:.0f} s), the last: {_describe(error)}; "
                    "check the store and the network, then start again: the run goes on where it stopped"
                ) from error
        finally:
            counts.add(requests=1, seconds=clock() - started)
        counts.add(retries=1)
        sleep(pause)


def classify(error: BaseException) -> Fault:
    """Say whether trying again can help.

    The class of an error of Python's own comes first, because s3fs translates most codes of S3 well; then trouble with
    the connection, and then the HTTP status and the code of S3, anywhere among the causes.
    """
    for kind, fault in _FAULT_OF_TYPE:
        if isinstance(error, kind):
            return fault
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) or _is_unknown_host(cause) for cause in causes):
        return Fault.FATAL
    if any(_is_network_trouble(cause) for cause in causes):
        return Fault.TRANSIENT
    codes = {code for cause in causes for code in _codes(cause)}
    for fault, known in _FAULT_OF_CODE.items():
        if codes & known:
            return fault
    return Fault.TRANSIENT if any(isinstance(code, int) and code >= 500 for code in codes) else Fault.FATAL


def is_pushback(error: BaseException) -> bool:
    """Tell whether a store says that it is asked too much: 429, 503 and their like, or no answer in time."""
    return any(isinstance(cause, TimeoutError) or _codes(cause) & _PUSHBACK_CODES for cause in _causes(error))


def http_status(error: BaseException) -> int:
    """Find the HTTP status of a failed request; 0 if it never came to one."""
    codes = (code for cause in _causes(error) for code in _codes(cause))
    return max((code for code in codes if isinstance(code, int)), default=0)


_FAULT_OF_TYPE: tuple[tuple[type[BaseException], Fault], ...] = (
    (TimeoutError, Fault.TRANSIENT),
    (ShortReadError, Fault.TRANSIENT),
    (ConnectionError, Fault.TRANSIENT),
    (PermissionError, Fault.FORBIDDEN),
    (FileNotFoundError, Fault.MISSING),
    (NotADirectoryError, Fault.MISSING),
)
_PUSHBACK_CODES: frozenset[int | str] = frozenset(
    {429, 503, "SlowDown", "ServiceUnavailable", "Throttling", "RequestTimeout", "RequestLimitExceeded"}
)
_FAULT_OF_CODE: dict[Fault, frozenset[int | str]] = {
    Fault.TRANSIENT: _PUSHBACK_CODES | {408, 425, "InternalError", "IncompleteBody"},
    Fault.FORBIDDEN: frozenset({401, 403, 407, "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}),
    Fault.MISSING: frozenset({404, 410, "NoSuchKey", "NoSuchBucket"}),
    Fault.FATAL: frozenset({501, 505}),
}
_NETWORK_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOBUFS",
        "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
# Bases of the errors of connections and of broken bodies. By name: importing them would cost every `--help`.
_NETWORK_TYPES = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "aiohttp.http_exceptions.HttpProcessingError",
        "botocore.exceptions.HTTPClientError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.FlexibleChecksumError",  # the body is not what its checksum says
        "botocore.parsers.ResponseParserError",  # S3 sends broken XML when it limits rates
        "requests.exceptions.ConnectionError",
        "requests.exceptions.ChunkedEncodingError",
        "http.client.IncompleteRead",
    }
)
_CODE_TYPES = frozenset({"gcsfs.retry.HttpError"})
_CREDENTIAL_TYPES = frozenset({"botocore.exceptions.NoCredentialsError", "botocore.exceptions.PartialCredentialsError"})


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Walk an error and what it wraps: `from`, and what botocore keeps in `kwargs` and aiohttp in `os_error`."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop(0)
        if isinstance(cause, BaseException) and cause not in seen:
            seen.append(cause)
            yield cause
            kept = getattr(cause, "kwargs", None)
            waiting += [cause.__cause__, getattr(cause, "os_error", None)]
            waiting += [kept.get("error")] if isinstance(kept, dict) else []


def _codes(error: BaseException) -> set[int | str]:
    """Read the HTTP status (aiohttp `status`, gcsfs `code`, botocore `response`) and the code of S3."""
    # `code` also exists in aiohttp, with 400 for an answer that breaks off.
    status = getattr(error, "code" if _has_type(error, _CODE_TYPES) else "status", None)
    found: set[int | str] = {status} if isinstance(status, int) and 100 <= status < 600 else set()
    if _has_type(error, _CREDENTIAL_TYPES):
        found.add(401)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found.add(str(response.get("Error", {}).get("Code", "")))
        found.add(int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)))
    return found - {"", 0}


def _is_network_trouble(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return True
    return getattr(error, "errno", None) in _NETWORK_ERRNOS or _has_type(error, _NETWORK_TYPES)


def _is_unknown_host(error: BaseException) -> bool:
    """Tell a host that does not exist from a name server that did not answer."""
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME


def _has_type(error: BaseException, names: frozenset[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def _asked_pause(error: BaseException, patience: Patience) -> float:
    """Read how long the store asks us to wait, at most our longest pause."""
    headers = getattr(error, "headers", None) or {}
    text = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    return min(float(text), patience.longest_pause_seconds) if text.isdigit() else 0.0


def _lasting_error(error: Exception, fault: Fault, what: str) -> Exception:
    """Say what will not pass, with its fix; an error that is not of a store is returned as it is."""
    if fault is Fault.MISSING:
        return MissingObjectError(f"{what}: not there ({_describe(error)}); check the path, and that it was uploaded")
    if fault is Fault.FORBIDDEN:
        return ForbiddenObjectError(
            f"{what}: access refused ({_describe(error)}); check the credentials (for s3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role) and what they may do with this path"
        )
    if isinstance(error, OSError) or http_status(error):
        return DataError(f"{what}: refused: {_describe(error)}; check the URL and the settings of the store")
    return error


def _describe(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    status = http_status(error)
    return f"{text}, status {status}" if status and str(status) not in text else text
