"""Run srun and wait for it, however the ranks, their nodes or Slurm behave."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from orchestrate.exits import STOP_SIGNALS
from orchestrate.launchers.slurm_commands import Commands
from orchestrate.launchers.srun_log import parse_srun_log

WATCHED = STOP_SIGNALS | {signal.SIGCHLD}
_LOOK_EVERY_SECONDS = 1.0
_BEAT_EVERY_SECONDS = 10.0
# srun kills what still lives KillWait after the first bad end, and a little later is told so by the nodes.
_SLACK_SECONDS = 15.0
# Share of KillWait that is left for the record of the end, when Slurm ends the job; at least a second.
_RECORD_SHARE = 0.1
_DEFAULT_KILL_WAIT_SECONDS = 30.0


class Step:
    """srun with the ranks of one attempt.

    Signals of WATCHED must be blocked in this process before it is made, as those that come are waited for.

    Args:
        commands: of Slurm, which say how long it waits before it kills.
        beat: called every few seconds.
    """

    def __init__(self, commands: Commands, *, beat: Callable[[], None]) -> None:
        self._commands, self._beat = commands, beat
        self._kill_at, self._next_beat = float("inf"), 0.0
        self._kill_wait_seconds, self._size = _DEFAULT_KILL_WAIT_SECONDS, -1
        self.stopped_by = ""

    def run(self, words: Sequence[str], *, environment: Mapping[str, str], log: Path) -> int | None:
        """Start srun with its complaints in `log`, and return its code; None if it had to be killed.

        srun waits for tasks of a node that is gone until Slurm gives the node up, which takes minutes. After the first
        bad end it gets the time in which every task that can be heard of must have ended. A file system that does not
        answer meanwhile ends nothing: the next look may find what this one did not.

        Raises:
            OSError: srun cannot be run.
        """
        # When Slurm ends the job, there is no time left to ask.
        self._kill_wait_seconds = _ask_kill_wait_seconds(self._commands)
        with _open_log(log) as errors:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stderr=errors, env=dict(environment), preexec_fn=_receive_signals
            )
        while process.poll() is None:
            self._wait_for_signal(process)
            with contextlib.suppress(OSError):
                self._limit_after_first_end(log)
            if time.monotonic() >= self._kill_at:
                _say("srun waits for ranks that are not heard of: SIGKILL")
                process.kill()
                process.wait()
                return None
        return process.returncode

    def pause(self, seconds: float) -> bool:
        """Sleep; return True at once if Slurm asks this job to end."""
        ends = time.monotonic() + seconds
        while not self.stopped_by and (left := ends - time.monotonic()) > 0:
            received = signal.sigtimedwait(WATCHED, left)
            if received is not None and received.si_signo != signal.SIGCHLD:
                self.stopped_by = signal.Signals(received.si_signo).name
        return bool(self.stopped_by)

    def _wait_for_signal(self, process: "subprocess.Popen[bytes]") -> None:
        left = self._kill_at - time.monotonic()
        received = signal.sigtimedwait(WATCHED, max(0.0, min(left, _LOOK_EVERY_SECONDS)))
        if received is not None and received.si_signo != signal.SIGCHLD:
            self._stop(process, signal.Signals(received.si_signo))
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + _BEAT_EVERY_SECONDS
            with contextlib.suppress(OSError):
                self._beat()

    def _stop(self, process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
        if number == signal.SIGTERM:
            left_for_record = max(1.0, _RECORD_SHARE * self._kill_wait_seconds)
            self._limit(max(1.0, self._kill_wait_seconds - left_for_record))
        if self.stopped_by:
            return
        self.stopped_by = number.name
        _say(f"{number.name} received: the ranks save and stop")
        process.send_signal(signal.SIGUSR1)  # srun passes it on; whoever meant this script alone reaches the ranks too

    def _limit_after_first_end(self, log: Path) -> None:
        size = log.stat().st_size
        if size == self._size:
            return
        if self._kill_at == float("inf") and parse_srun_log(log.read_text(errors="replace").splitlines()).ends:
            self._limit(self._kill_wait_seconds + _SLACK_SECONDS)
        self._size = size

    def _limit(self, seconds: float) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)


def _ask_kill_wait_seconds(commands: Commands) -> float:
    answer = commands.run("scontrol", "show", "config")
    found = re.search(r"^KillWait\s*=\s*(\d+)", answer.out, re.MULTILINE)
    return float(found[1]) if found else _DEFAULT_KILL_WAIT_SECONDS


def _open_log(path: Path) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """Open a log, or let srun complain into the batch script's output if there can be none."""
    try:
        return path.open("ab")
    except OSError as error:
        _say(f"{path}: {error.strerror}; srun's complaints are here")
        return contextlib.nullcontext()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the output may be on a full disk
        print(text, flush=True)


def _receive_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def read_complaints(folder: Path, ranks: Sequence[int], *, own: str = "") -> list[str]:
    """Return what srun and Slurm's step daemons said in an attempt's logs.

    Args:
        folder: of the logs; a step daemon complains in the log of its node's first rank, srun in its own.
        ranks: the first of every node.
        own: what the batch script's output got meanwhile.
    """
    said = own.splitlines()
    for name in ("srun.log", *(f"rank-{rank}.log" for rank in ranks)):
        said += _tail(folder / name).splitlines()
    return said


def _tail(path: Path, num_bytes: int = 2**16) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
