"""Signals of the in-job contract, sent to a real process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROLOG = """
import os, sys, time, threading
from pathlib import Path
from orchestrate.engine.watch import StopWatch
stop = StopWatch(Path(sys.argv[1]), grace_seconds=float(sys.argv[2]))
stop.start()
print("ready", flush=True)
"""
# A lock that is never released: the main thread sits in C, as in a collective.
BLOCKED = PROLOG + "lock = threading.Lock(); lock.acquire(); lock.acquire()"
OBEYING = PROLOG + "while not stop.requested: time.sleep(0.01)\nstop.obeyed(); print(stop.reason); sys.exit(75)"
FORKING = (
    PROLOG
    + """
child = os.fork()
if child == 0:
    time.sleep(1); os._exit(0)
os.kill(child, 15); os.waitpid(child, 0)
time.sleep(1.2)
print("requested" if stop.requested else "undisturbed"); os._exit(0)
"""
)


def started(code: str, stop_file: Path, grace_seconds: float = 30) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(stop_file), str(grace_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_stop_signal_is_noticed_and_obeyed(tmp_path: Path, number: signal.Signals) -> None:
    process = started(OBEYING, tmp_path / "stop")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (75, number.name)


def test_stop_file_is_noticed(tmp_path: Path) -> None:
    process = started(OBEYING, tmp_path / "stop")
    (tmp_path / "stop").touch()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (75, "stop file")


def test_process_that_cannot_stop_shows_its_stacks_and_ends_as_a_hang(tmp_path: Path) -> None:
    process = started(BLOCKED, tmp_path / "stop", grace_seconds=0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 86
    assert "asked to stop (SIGTERM)" in err
    assert "Current thread" in err or "Thread 0x" in err
    assert time.monotonic() - began < 10


def test_signal_to_a_forked_worker_stops_nothing(tmp_path: Path) -> None:
    process = started(FORKING, tmp_path / "stop")
    out, _ = process.communicate(timeout=20)
    assert out.strip() == "undisturbed"
