"""Processes that should not be on this node any more: workers of earlier attempts, and whoever uses our GPUs."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_ASKED = ("ORCHESTRATE_ATTEMPT", "ORCHESTRATE_JOB", "ORCHESTRATE_NODE", "ORCHESTRATE_GPUS", "ORCHESTRATE_STAGE")
_WORKER = "orchestrate.worker"


@dataclass(frozen=True)
class Worker:
    """A process that runs, or was forked by, a worker.

    Attributes:
        pid: of it.
        run_dir: what it works on.
        attempt, job, node, gpus, stage: as its launcher told it; empty if it did not.
    """

    pid: int
    run_dir: str
    attempt: str = ""
    job: str = ""
    node: str = ""
    gpus: str = ""
    stage: str = ""

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} of attempt {self.attempt or '?'}{job} is left on {self.run_dir}"


def find_strangers(processes: Path = Path("/proc")) -> list[str]:
    """Describe workers on this node that stand in this process's way; see `is_stranger`."""
    me = _read(processes / "self", os.getpid())
    return [] if me is None else [str(each) for each in _workers(processes) if is_stranger(each, me)]


def is_stranger(other: Worker, me: Worker) -> bool:
    """Tell whether a worker is of an earlier attempt at the same work, or of another job that has our GPUs.

    Workers of another node are not in our way, even where one host plays several nodes.
    """
    if other.node != me.node:
        return False
    is_ours = (other.job, other.attempt) == (me.job, me.attempt)
    is_same_work = other.run_dir == me.run_dir and (other.stage == "evaluate") == (me.stage == "evaluate")
    if is_same_work:
        return not is_ours
    shared = set(_numbers(other.gpus)) & set(_numbers(me.gpus))
    return bool(shared) and other.job != me.job


def _numbers(text: str) -> Iterator[str]:
    """List GPUs such as `0-1,3`."""
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            yield from map(str, range(int(first), int(last) + 1))
        else:
            yield part


def _workers(processes: Path) -> Iterator[Worker]:
    me = os.getpid()
    for entry in os.scandir(processes):
        if entry.name.isdigit() and int(entry.name) != me:
            worker = _read(Path(entry.path), int(entry.name))
            if worker is not None:
                yield worker


def _read(process: Path, pid: int) -> Worker | None:
    """Read who a process is; None if it is no worker, has ended, or is another user's."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if _WORKER not in words:
            return None
        told = _environment((process / "environ").read_bytes())
    except OSError:
        return None
    run_dir = words[words.index(_WORKER) + 1 :][:1]
    values = (told.get(name, "") for name in _ASKED)
    return Worker(pid, str(Path(run_dir[0]).absolute()) if run_dir else "", *values)


def _environment(block: bytes) -> Mapping[str, str]:
    pairs = (pair.partition("=") for pair in block.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def gpu_users(uuid: str) -> str:
    """Name the processes that use a GPU, as ` by ...`; empty if nobody can say."""
    query = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
    try:
        told = subprocess.run((*query, "-i", f"GPU-{uuid}"), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    users = [" ".join(line.split()) for line in told.stdout.splitlines() if line.count(",") == 2]
    return f" by process {'; '.join(users)}" if users else ""
