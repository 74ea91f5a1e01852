"""A reverse proxy that breaks answers on order: a store with faults, in front of any HTTP endpoint.

In a test: `with FaultProxy(endpoint) as proxy: proxy.add("503", times=2)`. As a process of its own, so that it answers
whatever the test does: `with proxy_process(endpoint) as url: add_fault(url, "503", times=2)`; `seen(url)` tells what
happened.
"""

import argparse
import dataclasses
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

Kind = Literal[
    "403",
    "404",
    "429",
    "500",
    "503",
    "silent",  # no answer at all
    "stall",  # headers and half of the body, then nothing
    "trickle",  # headers and then a byte each 50 ms
    "half",  # headers and half of the body, then the connection is closed
    "reset",  # the connection is reset before any answer
    "short",  # a complete answer with half of the bytes asked for
    "wrong",  # one byte in the middle is changed
    "etag",  # another entity tag
    "whole",  # the range is ignored: status 200 and the whole file
]
_STALL_SECONDS = 120.0  # ended by the client or by the end of the proxy
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "server", "date", "content-length"}


@dataclass
class Fault:
    """Break answers of one kind: the first `times` after `skip`, or each with a probability; -1 times is for ever."""

    kind: Kind
    times: int = 1
    skip: int = 0
    probability: float = 1.0
    method: str = "GET"
    path: str = ""  # part of the path that must be there
    retry_after: str = ""


class FaultProxy:
    """Serve on a free port of 127.0.0.1 from `with` to its end."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream)
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()  # of methods, and of faults as "fault <kind>"
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.sent_bytes = 0
        self.in_flight = self.most_in_flight = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._random = random.Random(seed)
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = "http://{}:{}".format(*self.server.server_address)

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: Kind, **options: Any) -> None:
        """Order a fault; see `Fault`."""
        with self.lock:
            self.faults.append(Fault(kind, **options))

    def next_fault(self, method: str, path: str, asked: str) -> Fault | None:
        """Count a request and pick what happens to it: the first fault that fits."""
        with self.lock:
            self.counts[method] += 1
            self.requests.append((method, path, asked))
            for fault in self.faults:
                if fault.times == 0 or fault.method != method or fault.path not in path:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if self._random.random() >= fault.probability:
                    continue
                fault.times -= 1
                self.counts[f"fault {fault.kind}"] += 1
                return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client gives up, as it should after a stall."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        if self.path.startswith("/__"):
            self._control()
            return
        with self.owner.lock:
            self.owner.in_flight += 1
            self.owner.most_in_flight = max(self.owner.most_in_flight, self.owner.in_flight)
        try:
            fault = self.owner.next_fault(self.command, self.path, self.headers.get("Range", ""))
            self._answer(fault, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        finally:
            with self.owner.lock:
                self.owner.in_flight -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, fault: Fault | None, sent: bytes) -> None:
        kind = fault.kind if fault else ""
        if fault and kind.isdigit():
            more = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._send(int(kind), more, _error_body(kind))
        elif kind == "silent":
            self.owner.closing.wait(_STALL_SECONDS)
            self.close_connection = True
        elif kind == "reset":
            linger_none = b"\1\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_none)
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True
        else:
            self._pass_on(kind, sent)

    def _pass_on(self, kind: str, sent: bytes) -> None:
        status, headers, body = self._ask_upstream(sent, without_range=kind == "whole")
        if kind == "etag":
            headers["ETag"] = '"changed"'
        if kind == "wrong" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x20]) + body[middle + 1 :]
        if kind == "short":
            body = body[: len(body) // 2]
        if kind == "trickle":
            self._send(status, headers, b"", claimed=len(body))
            for byte in body:
                if self.owner.closing.wait(0.05):
                    break
                self.wfile.write(bytes([byte]))
            self.close_connection = True
        elif kind in ("half", "stall"):
            self._send(status, headers, body[: len(body) // 2], claimed=len(body))
            self.wfile.flush()
            if kind == "stall":
                self.owner.closing.wait(_STALL_SECONDS)
            self.close_connection = True
        else:
            claimed = int(headers.pop("Content-Length", 0)) if self.command == "HEAD" else None
            self._send(status, headers, body, claimed=claimed)

    def _ask_upstream(self, sent: bytes, *, without_range: bool) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.owner.upstream.netloc, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
        if without_range:
            headers.pop("Range", None)
        upstream.request(self.command, self.path, body=sent or None, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length", "0")
        upstream.close()
        return answer.status, kept, body

    def _send(self, status: int, headers: dict[str, str], body: bytes, claimed: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            with self.owner.lock:
                self.owner.sent_bytes += len(body)

    def _control(self) -> None:
        if self.command == "POST":
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.owner.add(**fields)
        with self.owner.lock:
            body = {"counts": dict(self.owner.counts), "most_in_flight": self.owner.most_in_flight,
                    "sent_bytes": self.owner.sent_bytes,
                    "faults": [dataclasses.asdict(fault) for fault in self.owner.faults]}  # fmt: skip
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())


def _error_body(status: str) -> bytes:
    """Say it as S3 does."""
    code = {"403": "AccessDenied", "404": "NoSuchKey", "503": "SlowDown", "500": "InternalError"}.get(status, status)
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by the test</Message></Error>".encode()


@contextmanager
def proxy_process(upstream: str, *, seed: int = 0) -> Iterator[str]:
    """Run a proxy in a process of its own; yields its URL."""
    command = [sys.executable, "-m", "tests.data.fault_proxy", "--upstream", upstream, "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def add_fault(url: str, kind: Kind, **options: object) -> None:
    """Order a fault from a proxy in another process; see `Fault`."""
    body = json.dumps({"kind": kind, **options}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/__faults__", data=body)):
        pass


def seen(url: str) -> dict[str, Any]:
    """Tell what a proxy in another process did: counts, most_in_flight, sent_bytes, faults."""
    with urllib.request.urlopen(f"{url}/__counts__") as answer:
        return dict(json.load(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with FaultProxy(arguments.upstream, seed=arguments.seed) as proxy:
        print(proxy.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
