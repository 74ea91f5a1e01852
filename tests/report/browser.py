"""Look at a page with real Chromium: is anything broken, missing, or written over something else?

Speaks the DevTools protocol over a pipe, so that no driver and no network port is needed. As a script, takes a picture:

    python tests/report/browser.py PAGE PNG [--width 1200]
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--no-default-browser-check", "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and answers on 4; this puts our two there and becomes Chromium.
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_INSPECT = Path(__file__).parent / "inspect_page.js"


class BrowserError(Exception):
    """Chromium is missing, died or did not answer."""


@dataclass(frozen=True)
class PageFacts:
    """What a page looks like at one width; all lists are empty for a page that is in order."""

    width: int
    height: int
    num_texts: int
    num_pictures: int
    overflow_pixels: int
    overlaps: tuple[str, ...]
    clipped: tuple[str, ...]
    empty_pictures: tuple[str, ...]
    console_errors: tuple[str, ...]
    requests: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Say everything that is wrong, one sentence each."""
        wide = (f"page is {self.overflow_pixels} pixels wider than the window",) if self.overflow_pixels else ()
        return (
            *wide,
            *(f"text over text: {pair}" for pair in self.overlaps),
            *(f"text cut off: {text}" for text in self.clipped),
            *(f"picture without size or content: {name}" for name in self.empty_pictures),
            *(f"console error: {text}" for text in self.console_errors),
            *(f"request to the outside: {url}" for url in self.requests),
        )


@dataclass
class _Connection:
    """A DevTools session on one tab: commands out, answers and events in, each ended by a zero byte."""

    write_fd: int
    read_fd: int
    session: str | None = None
    last_id: int = 0
    received: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come first are kept."""
        self.last_id += 1
        message: dict[str, Any] = {"id": self.last_id, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.last_id:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str) -> None:
        """Wait until an event has come, now or earlier."""
        while not any(entry.get("method") == event for entry in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.read_fd], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.read_fd, 1 << 20) if ready else b""
            if not chunk:
                raise BrowserError("Chromium died" if ready else f"Chromium was silent for {TIMEOUT_SECONDS:.0f} s")
            self.received += chunk
        message, _, self.received = self.received.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value


def inspect_page(path: Path, width: int) -> PageFacts:
    """Open a local page in a window of `width` pixels and say what is there and what is wrong.

    Raises:
        BrowserError: Chromium is missing or does not answer.
    """
    with _open_page(path, width) as connection:
        script = _INSPECT.read_text(encoding="utf-8")
        answer = connection.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"inspect_page.js failed: {answer['exceptionDetails']}")
        found = answer["result"]["value"]
        return PageFacts(
            width=found["width"],
            height=found["height"],
            num_texts=found["numTexts"],
            num_pictures=found["numPictures"],
            overflow_pixels=found["overflowPixels"],
            overlaps=tuple(found["overlaps"]),
            clipped=tuple(found["clipped"]),
            empty_pictures=tuple(found["emptyPictures"]),
            console_errors=tuple(_console_errors(connection.events)),
            requests=tuple(_outside_requests(connection.events)),
        )


def screenshot(path: Path, png: Path, width: int, *, max_height: int = 16_000) -> None:
    """Take a picture of a whole local page in a window of `width` pixels, cut at `max_height`."""
    with _open_page(path, width) as connection:
        size = connection.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": min(size["height"], max_height), "scale": 1}
        answer = connection.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        png.write_bytes(base64.b64decode(answer["data"]))


def find_chromium() -> str:
    """Find the browser on the path.

    Raises:
        BrowserError: there is none.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise BrowserError("chromium is not installed; on Debian: apt-get install chromium")
    return found


@contextmanager
def _open_page(path: Path, width: int) -> Iterator[_Connection]:
    with _started_chromium() as connection:
        target = connection.call("Target.createTarget", url="about:blank")["targetId"]
        connection.session = connection.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            connection.call(f"{domain}.enable")
        connection.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        connection.call("Page.navigate", url=path.resolve().as_uri())
        connection.wait_for("Page.loadEventFired")
        yield connection


@contextmanager
def _started_chromium() -> Iterator[_Connection]:
    chromium = find_chromium()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        its_input, our_output = _pipe()
        our_input, its_output = _pipe()
        command = [sys.executable, "-c", _LAUNCH, str(its_input), str(its_output)]
        process = subprocess.Popen(
            [*command, chromium, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(its_input, its_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        try:
            yield _Connection(our_output, our_input)
        finally:
            os.close(our_output)  # the end of its input tells Chromium to quit
            os.close(our_input)
            _end(process)


def _pipe() -> tuple[int, int]:
    """Open a pipe on descriptors that 3 and 4 cannot collide with."""
    moved = []
    for descriptor in os.pipe():
        moved.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(descriptor)
    return moved[0], moved[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _console_errors(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            yield details.get("exception", {}).get("description", details["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            yield " ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            yield f"{params['entry']['text']} {params['entry'].get('url', '')}".strip()


def _outside_requests(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        if event.get("method") == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                yield url


def main() -> None:
    """Take a picture of a page from the command line."""
    parser = argparse.ArgumentParser(description="Take a picture of a local HTML page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--max-height", type=int, default=16_000)
    options = parser.parse_args()
    screenshot(options.page, options.png, options.width, max_height=options.max_height)


if __name__ == "__main__":
    main()
