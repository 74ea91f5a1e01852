"""Signals of the in-job contract, sent to a real process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrate.engine.watch import HangWatch

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


WAITING = PROLOG.replace("grace_seconds=", "data_grace_seconds=0.5, grace_seconds=") + (
    "lock = threading.Lock(); lock.acquire()\nwith stop.waiting_for_data(): lock.acquire()"
)


def test_process_that_waits_for_a_silent_store_ends_soon_and_asks_to_go_on_later(tmp_path: Path) -> None:
    process = started(WAITING, tmp_path / "stop")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 74
    assert "asked to stop (SIGTERM)" in err
    assert "waiting for data; the last checkpoint serves" in err


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


STUCK = BLOCKED.replace("grace_seconds=", "leaving=last_words, grace_seconds=").replace(
    "stop = Stop", "def last_words(code, reason): print(int(code), reason, flush=True); time.sleep(60)\nstop = Stop"
)


def test_last_words_are_said_and_a_disk_that_takes_none_holds_nobody(tmp_path: Path) -> None:
    process = started(STUCK, tmp_path / "stop", grace_seconds=0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)  # not the 60 s of the disk
    assert process.returncode == 86
    assert out.startswith("86 asked to stop (SIGTERM), but no step ended for 0 s")


def test_only_the_rank_that_looks_for_the_stop_file_sees_it(tmp_path: Path) -> None:
    code = PROLOG.replace("Path(sys.argv[1])", "None") + "time.sleep(1.2); print(stop.requested)"
    process = started(code, tmp_path / "stop")
    (tmp_path / "stop").touch()
    out, _ = process.communicate(timeout=20)
    assert out.strip() == "False"


def test_signal_to_a_forked_worker_stops_nothing(tmp_path: Path) -> None:
    process = started(FORKING, tmp_path / "stop")
    out, _ = process.communicate(timeout=20)
    assert out.strip() == "undisturbed"


# Two ranks join, one calls a collective and the other, after it has said so, waits for input that never comes.
HUNG = """
import sys
import torch
import torch.distributed as dist
from orchestrate.engine.watch import HangWatch
store, rank, limit_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
watch = HangWatch(limit_seconds)
watch.start()
def train(step):
    if step == 2 and rank == 1:
        sys.stdin.read()
    dist.all_reduce(torch.ones(1))
    watch.stepped()
for step in range(3):
    train(step)
"""
BUSY = """
import sys, time
from orchestrate.engine.watch import HangWatch
watch = HangWatch(float(sys.argv[1]))
watch.start()
began = time.monotonic()
while time.monotonic() - began < 3 * float(sys.argv[1]):
    watch.stepped()
watch.close()
print("alive")
"""


def test_rank_whose_peer_never_comes_ends_as_a_hang_and_shows_its_stacks(tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HUNG, str(tmp_path / "store"), str(rank), "2"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def end(process: subprocess.Popen[str]) -> str:
        assert process.stderr is not None
        shown = process.stderr.read()  # not communicate, which would close the input that a rank waits for
        assert process.wait(timeout=20) == 86, shown
        return shown

    ranks = [start(0), start(1)]
    waiting, elsewhere = (end(process) for process in ranks)
    assert "no step ended for 2 s, the last of 2 ended at " in waiting
    assert "in all_reduce" in waiting
    assert "in _watch" in waiting  # all threads, not the main one alone
    assert "in train" in elsewhere
    assert "in all_reduce" not in elsewhere  # so the culprit is found in the logs


def test_watch_lets_a_process_live_that_steps_or_has_closed_it() -> None:
    result = subprocess.run([sys.executable, "-c", BUSY, "0.3"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive\n", "")


SUSPENDED = """
import sys, time
from orchestrate.engine.watch import HangWatch
watch = HangWatch(2.0)
watch.start()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.5)  # in which a watch that takes the time of the suspension for a hang ends this process
watch.close()
print("alive")
"""


def test_time_in_which_a_job_was_suspended_is_no_hang() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    suspended = time.monotonic()
    os.waitpid(process.pid, os.WUNTRACED)
    while time.monotonic() < suspended + 2.5:
        time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    out, shown = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "alive\n"), shown


def test_watch_can_be_closed_before_it_began() -> None:
    HangWatch(60).close()
