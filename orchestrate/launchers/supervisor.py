"""Keep the ranks of one attempt on this host: start, watch, stop, record.

``python -m orchestrate.launchers.supervisor`` reads a LaunchPlan from its input, answers one line and lives as long as
the ranks do. It outlives whoever started it; the ranks do not outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from orchestrate.exits import SIGNAL_BASE, STOP_SIGNALS, Exit, group_exit_code
from orchestrate.launchers.attempts import attempt_numbers, checkpoint_step, exit_file, job_file, jobs_folder
from orchestrate.launchers.base import LaunchPlan, Phase
from orchestrate.runs import RunDir, write_json

STARTED, BUSY = "started", "busy"
COMMAND_NOT_FOUND = 127

_WATCHED = STOP_SIGNALS | {signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
# Variables of a surrounding job that would make our ranks join it.
_FOREIGN_PREFIXES = ("MASTER_", "TORCHELASTIC_", "SLURM_", "SBATCH_", "PMI_", "OMPI_")
# Pollers hold the lock for an instant, shared; only a holder that stays is another supervisor.
_LOCK_PATIENCE_SECONDS = 2.0


def lock_path(run: RunDir) -> Path:
    """Lock that the supervisor and its ranks hold for their lives."""
    return jobs_folder(run) / "lock"


def take_lock(run: RunDir) -> IO[str] | None:
    """Take the trial's job lock, or return None if processes of another job hold it."""
    file = lock_path(run).open("a")
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.02)


def lock_is_held(run: RunDir) -> bool:
    """Ask whether any process of a job of this trial lives."""
    try:
        with lock_path(run).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class RankGroup:
    """The rank processes of one attempt.

    Args:
        plan: what to start.
        keep_open: descriptor of the job lock; ranks inherit it, so that the lock is free only when all are gone.
    """

    def __init__(self, plan: LaunchPlan, *, keep_open: int) -> None:
        self._plan = plan
        self._keep_open = keep_open
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first: dict[int, int] = {}
        self._ending = False
        self._kill_at = float("inf")
        self.stopped_by: str | None = None

    def start(self) -> None:
        """Start every rank.

        Raises:
            OSError: the command cannot be run.
        """
        for rank in range(self._plan.ranks):
            path = RunDir(self._plan.run_dir).log_file(self._plan.attempt, rank)
            with path.open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        self._plan.command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self._plan.cwd,
                        env=rank_environment(self._plan, rank),
                        pass_fds=(self._keep_open,),
                        process_group=0,
                        preexec_fn=_die_with(os.getpid()),
                    )
                )

    def wait(self) -> None:
        """Return when every rank has ended; see to it that they do end once one of them failed or was asked to."""
        while not self._all_ended():
            timeout = max(0.0, min(self._kill_at - time.monotonic(), 5.0))
            received = signal.sigtimedwait(_WATCHED, timeout)
            if received is not None and received.si_signo != signal.SIGCHLD:
                self._stop(signal.Signals(received.si_signo))
            elif time.monotonic() >= self._kill_at:
                print("the grace is over: SIGKILL", flush=True)
                self.signal(signal.SIGKILL)
                self._kill_at = float("inf")
        self._kill_descendants()

    def _all_ended(self) -> bool:
        codes = [process.poll() for process in self._processes]
        if not self._ending:
            self._first = {rank: code for rank, code in enumerate(codes) if code}
            if self._first:
                self._end(signal.SIGTERM, self._grace_after(self._first.values()))
        return None not in codes

    def _grace_after(self, codes: Iterable[int]) -> float:
        # Ranks that end to be continued leave rank 0 behind, which publishes the checkpoint.
        only_continue = set(codes) == {Exit.CONTINUE}
        return self._plan.stop_grace_seconds if only_continue else self._plan.kill_grace_seconds

    def _stop(self, number: signal.Signals) -> None:
        self.stopped_by = self.stopped_by or number.name
        print(f"{number.name} received: {len(self._processes)} ranks are asked to save and stop", flush=True)
        self._end(number, self._plan.stop_grace_seconds)

    def _end(self, number: signal.Signals, grace_seconds: float) -> None:
        self._ending = True
        self._kill_at = min(self._kill_at, time.monotonic() + grace_seconds)
        self.signal(number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank that lives."""
        for process in self._processes:
            process.send_signal(number)

    def _kill_descendants(self) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def outcome(self) -> dict[str, object]:
        """Describe how the group ended; to be called after `wait`."""
        codes = [process.returncode for process in self._processes]
        code = group_exit_code(codes, list(self._first.values()), stopping=self.stopped_by is not None)
        plain = [SIGNAL_BASE - c if c < 0 else c for c in codes]
        first = [rank for rank in self._first if plain[rank] == code]
        failed = first or [rank for rank, c in enumerate(plain) if c == code]
        return {
            "exit_code": code,
            "rank_codes": plain,
            "rank_signals": [signal.Signals(-c).name if c < 0 else None for c in codes],
            "failed_rank": failed[0] if code and failed else None,
            "stopped_by": self.stopped_by,
        }


def _die_with(supervisor: int) -> Callable[[], None]:
    """Make a child that the kernel kills when the supervisor is gone, and that receives signals again."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the line above
            os._exit(SIGNAL_BASE + signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    return prepare


def rank_environment(plan: LaunchPlan, rank: int) -> dict[str, str]:
    """Return the whole environment of one rank."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN_PREFIXES)}
    return {**inherited, **plan.environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def supervise(plan: LaunchPlan, lock: IO[str]) -> None:
    """Run the ranks of an attempt to their end, with a record of the start and one of the end."""
    run = RunDir(plan.run_dir)
    rendezvous = jobs_folder(run) / f"{plan.attempt}.rendezvous"
    rendezvous.unlink(missing_ok=True)
    group = RankGroup(plan, keep_open=lock.fileno())
    try:
        group.start()
        group.wait()
        outcome = group.outcome()
    except OSError as error:
        group.signal(signal.SIGKILL)
        print(f"{plan.command[0]}: {error}", flush=True)
        outcome = {"exit_code": COMMAND_NOT_FOUND, "error": f"{plan.command[0]}: {error.strerror}"}
    rendezvous.unlink(missing_ok=True)
    write_json(exit_file(run, plan.attempt), {"attempt": plan.attempt, "ended": time.time(), **outcome})


def process_start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or a zombie.

    The pair of pid and start time is never used twice, a pid alone is.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """Name this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_here(record: Mapping[str, Any]) -> bool:
    """Tell whether the supervisor that wrote the record of a start is of this boot of this machine."""
    return "pid" in record and record.get("boot_id") == boot_id()


def sign_of_life(run: RunDir, record: Mapping[str, Any]) -> tuple[Phase, str]:
    """Say whether the job that wrote the record of a start lives, and why; for a job without a record of its end."""
    host = record.get("host", "")
    if lock_is_held(run):
        return Phase.RUNNING, f"processes of the job hold {run.path.name}/jobs/lock on {host}"
    if is_here(record):
        if process_start_ticks(record["pid"]) == record["start_ticks"]:
            return Phase.RUNNING, f"its supervisor is process {record['pid']}"
        return Phase.LOST, f"process {record['pid']} is gone and left no exit code; it was killed"
    if host == socket.gethostname():
        return Phase.LOST, "the host has booted since"
    # File locks do not reach over every shared file system, so a free lock proves nothing about another host.
    return Phase.UNKNOWN, f"it was started on {host}, which cannot be asked from {socket.gethostname()}"


def _record_start(plan: LaunchPlan) -> None:
    identity = {"pid": os.getpid(), "start_ticks": process_start_ticks(os.getpid()), "boot_id": boot_id()}
    facts = {"name": plan.name, "attempt": plan.attempt, "ranks": plan.ranks, "host": socket.gethostname()}
    started = {"started": time.time(), "command": list(plan.command), "environment": dict(plan.environment)}
    started |= {"cwd": str(plan.cwd)}
    run = RunDir(plan.run_dir)
    progress = {"checkpoint_step": checkpoint_step(run)}
    write_json(job_file(run, plan.attempt), {**identity, **facts, **started, **progress})


def main() -> int:
    """Answer `started <pid>` or `busy <why>` on the output, then keep the ranks."""
    plan = LaunchPlan.from_json(sys.stdin.read())
    run = RunDir(plan.run_dir)
    logs = run.log_file(plan.attempt, 0).parent
    logs.mkdir(parents=True, exist_ok=True)
    jobs_folder(run).mkdir(exist_ok=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    lock = take_lock(run)
    if lock is None:
        print(f"{BUSY} {plan.name} is running already", flush=True)
        return 1
    used = attempt_numbers(run)
    if used and used[-1] >= plan.attempt:
        print(f"{BUSY} {plan.name} is at attempt {used[-1]} already", flush=True)
        return 1
    _record_start(plan)
    with contextlib.suppress(BrokenPipeError):  # whoever asked may be gone; the job was wanted all the same
        print(f"{STARTED} {os.getpid()}", flush=True)
    log = os.open(logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    supervise(plan, lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
