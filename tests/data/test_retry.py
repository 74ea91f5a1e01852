import errno
import socket
import ssl
from collections.abc import Callable

import aiohttp
import botocore.exceptions
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.errors import translate_boto_error
from yarl import URL

from orchestrate.data.retry import (
    Fault,
    ForbiddenObjectError,
    MissingObjectError,
    Patience,
    ReadCounts,
    ShortReadError,
    classify,
    is_pushback,
    with_retries,
)
from orchestrate.errors import DataError, StorageError


class Clock:
    """Time that passes only while somebody sleeps on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(*errors: BaseException) -> Callable[[], str]:
    """Raise one error after the other, then work."""
    waiting = list(errors)

    def call() -> str:
        if waiting:
            raise waiting.pop(0)
        return "bytes"

    return call


def http_error(status: int, **headers: str) -> aiohttp.ClientResponseError:
    nothing = CIMultiDictProxy(CIMultiDict[str]())
    request = aiohttp.RequestInfo(URL("http://host/x"), "GET", headers=nothing, real_url=URL("http://host/x"))
    return aiohttp.ClientResponseError(request, (), status=status, message="said no", headers=CIMultiDict(headers))


def s3_error(code: str, status: int) -> botocore.exceptions.ClientError:
    fields = {"Error": {"Code": code, "Message": "said no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(fields, "GetObject")


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


KEY = aiohttp.client_reqrep.ConnectionKey("host", 443, True, True, None, None, None)
TRANSIENT = [
    *[http_error(status) for status in (408, 425, 429, 500, 502, 503, 504)],
    s3_error("SlowDown", 503),
    s3_error("RequestTimeout", 400),
    s3_error("InternalError", 500),
    s3_error("429", 429),
    TimeoutError(),
    ConnectionResetError(),
    BrokenPipeError(),
    ShortReadError("cut"),
    OSError(errno.ESTALE, "stale"),
    OSError(errno.ENETUNREACH, "no route"),
    aiohttp.ClientPayloadError("cut"),
    caused_by(aiohttp.ClientPayloadError("cut"), aiohttp.http_exceptions.ContentLengthError("5 of 9 bytes")),
    caused_by(http_error(400), aiohttp.http_exceptions.BadStatusLine("garbage")),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientConnectorError(KEY, OSError(errno.ECONNREFUSED, "refused")),
    aiohttp.ServerTimeoutError(),
    botocore.exceptions.ReadTimeoutError(endpoint_url="x", error=""),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="x", error=""),
    botocore.exceptions.EndpointConnectionError(endpoint_url="x", error="refused"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="x", error=""),
    botocore.exceptions.HTTPClientError(error=aiohttp.ClientOSError()),
    socket.gaierror(socket.EAI_AGAIN, "try again"),
]
LASTING = [
    (http_error(404), Fault.MISSING),
    (http_error(410), Fault.MISSING),
    (http_error(401), Fault.FORBIDDEN),
    (http_error(403), Fault.FORBIDDEN),
    (http_error(400), Fault.FATAL),
    (http_error(501), Fault.FATAL),
    (s3_error("NoSuchKey", 404), Fault.MISSING),
    (s3_error("NoSuchBucket", 404), Fault.MISSING),
    (s3_error("AccessDenied", 403), Fault.FORBIDDEN),
    (s3_error("ExpiredToken", 400), Fault.FORBIDDEN),
    (s3_error("PermanentRedirect", 301), Fault.FATAL),
    (botocore.exceptions.NoCredentialsError(), Fault.FORBIDDEN),
    (FileNotFoundError("x"), Fault.MISSING),
    (PermissionError("x"), Fault.FORBIDDEN),
    (OSError(errno.EIO, "disk"), Fault.FATAL),
    (aiohttp.ClientConnectorDNSError(KEY, socket.gaierror(socket.EAI_NONAME, "unknown")), Fault.FATAL),
    (aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("self-signed")), Fault.FATAL),
    (ValueError("a bug"), Fault.FATAL),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_faults_that_may_pass_are_transient(error: BaseException) -> None:
    assert classify(error) is Fault.TRANSIENT


@pytest.mark.parametrize(("error", "fault"), LASTING, ids=repr)
def test_faults_that_last_are_not_transient(error: BaseException, fault: Fault) -> None:
    assert classify(error) is fault


@pytest.mark.parametrize("error", [e for e in TRANSIENT if isinstance(e, botocore.exceptions.ClientError)], ids=repr)
def test_what_s3fs_makes_of_an_error_is_classified_like_the_error(error: botocore.exceptions.ClientError) -> None:
    assert classify(translate_boto_error(error)) is Fault.TRANSIENT


@pytest.mark.parametrize(
    ("error", "fault"), [pair for pair in LASTING if isinstance(pair[0], botocore.exceptions.ClientError)], ids=repr
)
def test_what_s3fs_makes_of_a_lasting_error_is_classified_like_the_error(error: BaseException, fault: Fault) -> None:
    assert classify(translate_boto_error(error)) is fault


def test_a_cause_tells_what_an_empty_error_hides() -> None:
    assert classify(caused_by(OSError("failed"), http_error(503))) is Fault.TRANSIENT
    assert classify(caused_by(OSError("failed"), http_error(403))) is Fault.FORBIDDEN


def test_only_limits_and_timeouts_push_back() -> None:
    for error in (http_error(429), http_error(503), TimeoutError(), s3_error("SlowDown", 503)):
        assert is_pushback(error)
    for error in (http_error(500), ConnectionResetError(), ShortReadError()):
        assert not is_pushback(error)


def test_each_try_and_each_retry_is_counted() -> None:
    clock, counts = Clock(), ReadCounts()
    faults = failing(http_error(503), ConnectionResetError(), ShortReadError("cut"))
    answer = with_retries(faults, what="u", counts=counts, clock=clock.read, sleep=clock.sleep)
    assert answer == "bytes"
    seen = counts.snapshot()
    assert (seen["requests"], seen["retries"], seen["pushbacks"], seen["wrong_length"]) == (4, 3, 1, 1)


def test_pauses_are_uniform_up_to_a_bound_that_doubles_to_its_longest() -> None:
    patience = Patience(attempts=8, first_pause_seconds=1.0, longest_pause_seconds=10.0)
    clock = Clock()
    always = failing(*[ConnectionResetError()] * 7)
    with_retries(always, what="u", counts=ReadCounts(), patience=patience, clock=clock.read, sleep=clock.sleep,
                 jitter=lambda: 0.5)  # fmt: skip
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_ranks_that_failed_together_do_not_come_back_together() -> None:
    clock, patience = Clock(), Patience(first_pause_seconds=1.0)
    for _ in range(200):
        with_retries(failing(ConnectionResetError()), what="u", counts=ReadCounts(), patience=patience,
                     clock=clock.read, sleep=clock.sleep)  # fmt: skip
    quarters = [sum(quarter / 4 <= pause < (quarter + 1) / 4 for pause in clock.pauses) for quarter in range(4)]
    # 50 expected in each; 20 is five standard deviations away
    assert min(quarters) > 20


def test_a_store_that_says_when_to_come_back_is_obeyed() -> None:
    clock = Clock()
    with_retries(failing(http_error(429, **{"Retry-After": "7"})), what="u", counts=ReadCounts(), clock=clock.read,
                 sleep=clock.sleep)  # fmt: skip
    assert clock.pauses == [7.0]


@pytest.mark.parametrize(
    ("patience", "tries"), [(Patience(attempts=3), 3), (Patience(budget_seconds=0.0, first_pause_seconds=1.0), 1)]
)
def test_spent_retries_end_in_a_resumable_error_that_names_the_url(patience: Patience, tries: int) -> None:
    clock, counts = Clock(), ReadCounts()
    with pytest.raises(StorageError, match=rf"s3://b/x: no good answer .asked {tries} times .*503") as raised:
        with_retries(failing(*[http_error(503)] * 9), what="s3://b/x", counts=counts, patience=patience,
                     clock=clock.read, sleep=clock.sleep, jitter=lambda: 1.0)  # fmt: skip
    assert raised.value.exit_code == 74
    assert counts.snapshot()["requests"] == tries


@pytest.mark.parametrize(
    ("error", "kind", "python_kind", "fix"),
    [
        (http_error(403), ForbiddenObjectError, PermissionError, "AWS_ACCESS_KEY_ID"),
        (s3_error("NoSuchKey", 404), MissingObjectError, FileNotFoundError, "check the path"),
        (http_error(400), DataError, DataError, "check the URL"),
    ],
)
def test_lasting_faults_are_raised_at_once_with_url_and_fix(
    error: Exception, kind: type[DataError], python_kind: type[Exception], fix: str
) -> None:
    counts = ReadCounts()
    with pytest.raises(kind, match=f"s3://b/x.*{fix}") as raised:
        with_retries(failing(error), what="s3://b/x", counts=counts, sleep=lambda seconds: pytest.fail("it waited"))
    assert isinstance(raised.value, python_kind)
    assert counts.snapshot()["requests"] == 1


def test_a_bug_keeps_its_type() -> None:
    with pytest.raises(ZeroDivisionError):
        with_retries(lambda: str(1 // 0), what="u", counts=ReadCounts())
