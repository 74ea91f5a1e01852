"""One try of one request to a store that is not a local folder: clients without retries of their own, cut when stalled.

Libraries below retry too, and their tries would multiply with ours and be counted by nobody. What is switched off:
botocore's (`retries` in its config) and those of s3fs (`S3FileSystem.retries`, 5 tries of each call, twice nested in
reads); fsspec's http client has none. What stays: aiohttp asks a second time, at once and
uncounted, where a connection breaks before an answer begins (RFC 9112, 9.3.1: kept connections may be closed any
time); and gcsfs has six tries of its own without a switch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from orchestrate.data.retry import Patience, ShortReadError, http_status
from orchestrate.errors import DataError

T = TypeVar("T")

# botocore's default of 10 connections would cap what a fetcher may ask for at once.
_CONNECTIONS = 64
# A server that ignores `Range` answers with the whole file: taken if that wastes no more than this and the range again.
_TOLERATED_WASTE_BYTES = 1 << 20
# Requests of unknown length (whole small files: manifests, sidecars) are timed as if they had this one.
_UNKNOWN_BYTES = 64 << 20


def read_range(url: str, offset: int, length: int | None, patience: Patience) -> bytes:
    """Read a byte range, or up to the end; fewer bytes come back where the object ends early.

    Raises:
        ShortReadError: fewer bytes came, though the object goes on.
        DataError: the server ignores ranges.
        Exception: whatever the client raises; see `retry.classify`.
    """
    if length == 0:
        return b""
    store, path = _open(url, patience)
    stop = None if length is None else offset + length
    seconds = patience.request_seconds(_UNKNOWN_BYTES if length is None else length)
    try:
        if _is_http(url):
            data = _run(store, _http_range(store, path, offset, stop), seconds)
        elif offset == 0 and stop is None:
            data = _call(store, "cat_file", path, seconds=seconds)  # an empty S3 object has no valid range
        else:
            data = _call(store, "cat_file", path, seconds=seconds, start=offset, end=stop)
    except Exception as error:
        if http_status(error) != 416:
            raise
        data = b""  # the range begins behind the end
    if length is not None and len(data) > length:
        raise _range_ignored(url, len(data))
    if length is not None and len(data) < length:
        _check_end(url, offset + len(data), offset + length, patience)
    return bytes(data)


def stat(url: str, patience: Patience) -> tuple[int, str]:
    """Ask for the size in bytes and the version: entity tag, or else time of change; "" if the store tells neither."""
    store, path = _open(url, patience)
    seconds = patience.request_seconds(0)
    if _is_http(url):
        return _run(store, _http_stat(store, path), seconds)
    store.invalidate_cache()  # listings are cached, and an object may have been replaced since
    fields = _call(store, "info", path, seconds=seconds)
    if fields.get("type") == "directory" or fields.get("size") is None:
        raise FileNotFoundError(f"{url}: a folder, or of unknown size")
    return int(fields["size"]), version_of(fields)


def write_object(url: str, data: bytes, patience: Patience) -> None:
    """Write a whole object: stores show it when it is complete, not before."""
    if _is_http(url):
        raise DataError(f"{url}: cannot be written: http(s) is read only; choose a folder or a bucket")
    store, path = _open(url, patience)
    _call(store, "pipe_file", path, data, seconds=patience.request_seconds(len(data)))


def remove_folder(url: str, patience: Patience) -> None:
    """Remove all objects below a folder."""
    store, path = _open(url, patience)
    store.invalidate_cache()
    _call(store, "rm", path, recursive=True, seconds=patience.request_seconds(_UNKNOWN_BYTES))


def list_names(folder: str, pattern: str | None, patience: Patience) -> list[str]:
    """List what lies in a folder, or matches a pattern below it, as names relative to the folder."""
    store, path = _open(folder, patience)
    store.invalidate_cache()
    prefix = f"{path.rstrip('/')}/"
    found = store.ls(path, detail=False) if pattern is None else store.glob(f"{prefix}{pattern}")
    return [str(name).removeprefix(prefix) for name in found]


def version_of(fields: Mapping[str, Any]) -> str:
    """Name the version in what a store tells about an object, after its kind."""
    for name in ("ETag", "etag", "mtime", "updated", "created", "LastModified", "last_modified"):
        if fields.get(name):
            return f"{'etag' if name.lower() == 'etag' else 'time'}:{str(fields[name]).strip(chr(34))}"
    return ""


def _open(url: str, patience: Patience) -> tuple[Any, str]:
    """Find the fsspec client of a URL; imported here because local data and `--help` never need it."""
    import fsspec

    try:
        options = {scheme: _options(scheme, patience) for scheme in _schemes(url)}
        store, path = fsspec.core.url_to_fs(url, **{scheme: found for scheme, found in options.items() if found})
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot open this kind of URL: {error}") from error
    if hasattr(type(store), "retries"):
        store.retries = 1  # our options make this client ours: nobody else's is changed
    return store, path


def _schemes(url: str) -> list[str]:
    return [part.split("://")[0] for part in url.split("::") if "://" in part]


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _options(scheme: str, patience: Patience) -> dict[str, Any]:
    """Build the client's options: no retries, timeouts for a silent connection, enough connections.

    What the user set for fsspec (FSSPEC_S3_..., ~/.config/fsspec) stays and goes first.
    """
    from fsspec.config import conf

    if scheme in ("s3", "s3a"):
        own: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.stall_seconds,
        }
        configured = conf.get(scheme, {}).get("config_kwargs", {})
        # One connection per call: a read of a whole object is then one request instead of two.
        return {"config_kwargs": {**own, **configured, "retries": own["retries"]}, "max_concurrency": 1}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.connect_seconds, sock_read=patience.stall_seconds
        )
        configured = conf.get(scheme, {}).get("client_kwargs", {})
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, **configured}}
    return {}


def _call(store: Any, method: str, *args: Any, seconds: float, **options: Any) -> Any:
    """Call a method of a client; a client without coroutines cannot be cut and has to time out by itself."""
    if getattr(store, "async_impl", False):
        return _run(store, getattr(store, f"_{method}")(*args, **options), seconds)
    return getattr(store, method)(*args, **options)


def _run(store: Any, request: Coroutine[Any, Any, T], seconds: float) -> T:
    """Run a request on the client's event loop and cancel it when its time is over."""
    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(request, seconds), store.loop).result()


async def _http_range(store: Any, url: str, start: int, stop: int | None) -> bytes:
    """Read a range over HTTP; fsspec's own `cat_file` would take the whole file for the range.

    The body is not touched before the status is known.
    """
    session = await store.set_session()
    headers = {**store.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    async with session.get(store.encode_url(url), **{**store.kwargs, "headers": headers}) as answer:
        answer.raise_for_status()
        if answer.status == 206:
            got = answer.headers.get("Content-Range", "")
            if got and not got.startswith(f"bytes {start}-"):
                raise ShortReadError(f"asked for byte {start}, got {got}")
        elif "Range" in headers:
            whole = answer.content_length
            if whole is None or (stop is not None and whole > 2 * stop - start + _TOLERATED_WASTE_BYTES):
                raise _range_ignored(url, whole)
            return bytes((await answer.read())[start:stop])
        return bytes(await answer.read())


async def _http_stat(store: Any, url: str) -> tuple[int, str]:
    """Ask for the headers; with a range of one byte where HEAD is not allowed (presigned URLs) or tells no size."""
    session = await store.set_session()
    headers = {**store.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    options = {**store.kwargs, "headers": headers, "allow_redirects": True}
    async with session.head(store.encode_url(url), **options) as answer:
        if answer.ok and answer.content_length is not None:
            return answer.content_length, _http_version(answer.headers)
        if answer.status not in (200, 400, 403, 405, 501):
            answer.raise_for_status()
    headers["Range"] = "bytes=0-0"
    async with session.get(store.encode_url(url), **options) as answer:
        if answer.status != 416:
            answer.raise_for_status()
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else answer.content_length
        if size is None:
            raise DataError(f"{url}: the server does not tell its size; copy it to a folder or a bucket")
        return size, _http_version(answer.headers)


def _http_version(headers: Mapping[str, str]) -> str:
    return version_of({"ETag": headers.get("ETag"), "LastModified": headers.get("Last-Modified")})


def _check_end(url: str, got_to: int, wanted_to: int, patience: Patience) -> None:
    """Tell an object that ends early from an answer that does."""
    size, _ = stat(url, patience)
    if got_to < min(size, wanted_to):
        raise ShortReadError(f"the answer ends at byte {got_to:,}, the object has {size:,}")


def _range_ignored(url: str, num_bytes: int | None) -> DataError:
    answered = "a body of unknown length" if num_bytes is None else f"{num_bytes:,} bytes"
    return DataError(
        f"{url}: the server ignores byte ranges (it answered with {answered}); serve the files with one that "
        "knows them (nginx, Apache, an object store), or copy the dataset to a local folder"
    )
