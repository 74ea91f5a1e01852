"""A real Slurm on this machine, and the ways to hurt it."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINI_SLURM = ROOT / "scripts" / "mini_slurm"
# A start takes 1 s, with accounting 6 s, on free cores.
START_SECONDS = 120.0
# Far beyond what anything here takes on two cores that are shared with other tests.
PATIENCE_SECONDS = 150.0
LOG_LINES = 30


def wait_for(condition: Callable[[], object], what: str, *, patience: float = PATIENCE_SECONDS) -> None:
    """Look again and again; fail if it does not come true."""
    ends = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < ends, f"waited in vain for {patience:.0f} s: {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Job:
    """A line of squeue."""

    id: str
    name: str
    state: str
    nodes: str
    reason: str


@dataclass(frozen=True)
class Process:
    """A process of a job, by what Slurm gave it."""

    pid: int
    command: str
    environment: dict[str, str]

    @property
    def is_rank(self) -> bool:
        """Whether it is the worker of a rank, and no loader process of it."""
        return "orchestrate.worker" in self.command and "SLURM_PROCID" in self.environment


class Cluster:
    """A cluster of nodes in a folder of its own, on free ports; with accounting they are called a1, a2, else m1, m2.

    Names differ because all live on one host, where a worker that should have ended is known by the name of its node.

    Args:
        folder: short; sockets lie in it.
        nodes: how many.
        accounting: whether slurmdbd runs.
        preempt_signal: whether Slurm sends the signal of `--signal` to jobs that are preempted.
    """

    def __init__(self, folder: Path, *, nodes: int = 4, accounting: bool = False, preempt_signal: bool = True) -> None:
        self.folder = folder
        self.accounting = accounting
        self._options = ["--nodes", str(nodes), "--prefix", "a" if accounting else "m"]
        self._options += ["--accounting"] * accounting + ["--no-preempt-signal"] * (not preempt_signal)
        # slurmctld is not killed between a request and its answer: scontrol would call one that was granted refused.
        self._controller_wanted = threading.RLock()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def up(self) -> None:
        """Start it.

        Raises:
            AssertionError: it did not start; with the ends of its logs.
        """
        command = [str(MINI_SLURM), "up", str(self.folder), *self._options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"no Slurm, but:\n{done.stdout}{done.stderr}\n{self.logs()}"

    def down(self) -> None:
        """End it, with everything that its jobs have started."""
        subprocess.run([str(MINI_SLURM), "down", str(self.folder)], check=True, timeout=START_SECONDS)

    def logs(self) -> str:
        """Return the ends of all logs."""
        parts = []
        for path in sorted(self.folder.glob("log/*.log")):
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            parts += [f"==> {path.name} <==", *lines]
        return "\n".join(parts)

    def run(self, *command: object, check: bool = True) -> str:
        """Run a command of Slurm and return what it says; again while slurmctld is away, if its success is wanted."""
        words = [str(word) for word in command]
        ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            environment = os.environ | self.environment
            done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
            silent = "Unable to contact" in done.stderr or "timed out" in done.stderr
            if not (check and silent and time.monotonic() < ends):
                assert not check or done.returncode == 0, f"{command}: {done.stderr}"
                return done.stdout

    def change(self, *command: object) -> str:
        """Run a command that changes something, as `run` does, while no test takes slurmctld away."""
        with self._controller_wanted:
            return self.run(*command)

    # What there is

    def jobs(self, name: str = "") -> list[Job]:
        """List the jobs that Slurm remembers, ended ones too; of one name if given."""
        text = self.run("squeue", "--noheader", "--states=all", "--format=%i|%j|%T|%N|%r")
        found = [Job(*line.split("|")) for line in text.splitlines()]
        return [job for job in found if name in ("", job.name)]

    def running(self, name: str) -> Job | None:
        """Return the running job of a name."""
        return next((job for job in self.jobs(name) if job.state == "RUNNING"), None)

    def processes(self, *, node: str = "", job: str = "", rank: int | None = None) -> list[Process]:
        """List the processes of jobs of this cluster, of one node, job and rank if given."""
        wanted = dict(self.environment)
        wanted |= {"SLURMD_NODENAME": node} if node else {}
        wanted |= {"SLURM_JOB_ID": job} if job else {}
        wanted |= {"SLURM_PROCID": str(rank)} if rank is not None else {}
        found = []
        for pid in _pids():
            environment = _environment(pid)
            if "SLURMD_NODENAME" in environment and wanted.items() <= environment.items():
                found.append(Process(pid, _command(pid), environment))
        return found

    def ranks(self, job: str) -> dict[int, int]:
        """Return the process of each rank of a job: the outermost one, if it has children like itself."""
        ranks = [process for process in self.processes(job=job) if process.is_rank]
        ours = {process.pid for process in ranks}
        return {int(each.environment["SLURM_PROCID"]): each.pid for each in ranks if _parent(each.pid) not in ours}

    def wait_for_ranks(self, job: str, count: int) -> dict[int, int]:
        """Wait until all ranks of a job have become workers, and return their processes."""
        wait_for(lambda: len(self.ranks(job)) == count, f"job {job} has {count} ranks")
        return self.ranks(job)

    # Faults

    def signal_rank(self, job: str, rank: int, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to one rank; tell whether it was there."""
        pid = self.ranks(job).get(rank)
        return pid is not None and _kill(pid, number)

    def kill_node(self, node: str) -> None:
        """Let a node vanish: its daemon, its steps, their tasks, all at once."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        log = str(self.folder / "log" / f"{node}.log")
        steps = [pid for pid in _pids() if _name(pid).startswith("slurmstepd") and log in _open_files(pid)]
        for pid in (daemon, *steps, *(process.pid for process in self.processes(node=node))):
            _kill(pid)
        for process in self.processes(node=node):  # that were born meanwhile
            _kill(process.pid)

    def revive_node(self, node: str) -> None:
        """Start the daemon of a node that was killed; it comes back into service by itself."""
        self._daemon("slurmd", "-N", node)

    def stop_controller(self) -> None:
        """SIGKILL slurmctld; jobs go on."""
        pid = self._controller_pid()
        assert pid is not None, f"slurmctld is not there\n{self.logs()}"
        # It leaves a child that runs scripts, which ends by itself.
        _kill(pid)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "slurmctld is gone")

    def start_controller(self) -> None:
        """Start slurmctld again, with the state that it saved."""
        self._daemon("slurmctld")
        wait_for(lambda: self.run("scontrol", "ping", check=False).find(" UP") >= 0, "slurmctld answers")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Take slurmctld away for a while."""
        with self._controller_wanted:
            self.stop_controller()
            try:
                yield
            finally:
                self.start_controller()

    def _controller_pid(self) -> int | None:
        text = (self.folder / "slurmctld.pid").read_text().strip()
        return int(text) if text and _name(int(text)) == "slurmctld" else None

    def _daemon(self, *command: str) -> None:
        conf = str(self.folder / "slurm.conf")
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        environment = os.environ | self.environment | {"PATH": path}
        subprocess.run([*command, "-f", conf], check=True, env=environment, timeout=60, stdin=subprocess.DEVNULL)

    def preempt(self, nodes: Sequence[str], *, seconds: float = 1.0) -> str:
        """Let a job of the partition `high` take whole nodes for a while; return its id."""
        where = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive")
        what = ("--parsable", "--partition=high", "--output=/dev/null", "--job-name=urgent")
        return self.change("sbatch", *what, *where, f"--wrap=sleep {seconds}").strip()

    def requeue(self, job: str) -> None:
        """`scontrol requeue`."""
        self.change("scontrol", "requeue", job)

    def signal(self, job: str, name: str) -> None:
        """`scancel --signal`."""
        self.change("scancel", f"--signal={name}", job)

    def send_preempt_signal(self, wanted: bool) -> None:
        """Turn `preempt_send_user_signal` on or off for the jobs that start from now on."""
        path = self.folder / "slurm.conf"
        line = "SlurmctldParameters=preempt_send_user_signal"
        text = re.sub(rf"^#?{line}\n|^\n", "", path.read_text(), flags=re.MULTILINE)
        path.write_text(text + line + "\n" if wanted else text)
        self.change("scontrol", "reconfigure")


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    return ""


def _environment(pid: int) -> dict[str, str]:
    pairs = (line.partition("=") for line in _read(pid, "environ").split("\0"))
    return {key: value for key, _, value in pairs}


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ")


def _name(pid: int) -> str:
    return _read(pid, "comm").strip()


def _parent(pid: int) -> int:
    # The name, in brackets, may hold spaces.
    return int((_read(pid, "stat").rpartition(")")[2].split() or ["", "0"])[1])


def _open_files(pid: int) -> list[str]:
    files = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                files.append(str(entry.readlink()))
    return files


def _kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
