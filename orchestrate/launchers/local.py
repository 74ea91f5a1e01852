"""Run trials as processes of this host."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate.errors import LaunchError
from orchestrate.launchers.base import (
    JobExistsError,
    JobState,
    LaunchPlan,
    Phase,
    RunSpec,
    exit_file,
    job_file,
    job_numbers,
    jobs_folder,
    trial_of,
)
from orchestrate.launchers.supervisor import BUSY, STARTED, boot_id, lock_is_held, process_start_ticks
from orchestrate.runs import RunDir, read_json

if TYPE_CHECKING:
    from orchestrate.launchers.cluster import ClusterConfig

WORKER = (sys.executable, "-m", "orchestrate.worker")
# A supervisor answers in a fraction of a second; on a crowded host it may wait for a core.
_ANSWER_SECONDS = 60.0


class LocalLauncher:
    """One supervisor process a job, which outlives the command that started it.

    A job id is the job's name and the number of the attempt, so that a request about one attempt never hits the next.

    Args:
        cluster: resources of a job and the environment of its workers.
        runs: folder that holds `trials/`.
        worker: command of a rank, to which the RunDir is added.
    """

    def __init__(self, cluster: ClusterConfig, runs: Path, *, worker: tuple[str, ...] = WORKER) -> None:
        self._cluster = cluster
        self._trials = runs.absolute() / "trials"
        self._worker = worker
        self._children: list[subprocess.Popen[bytes]] = []

    def plan(self, spec: RunSpec) -> LaunchPlan:
        """Decide everything about a submission, doing nothing."""
        resources = self._cluster.resources
        run_dir = spec.run_dir.absolute()
        rendezvous = jobs_folder(RunDir(run_dir)) / f"{spec.attempt}.rendezvous"
        environment = {
            "WORLD_SIZE": str(resources.ranks),
            "LOCAL_WORLD_SIZE": str(resources.ranks),
            "ORCHESTRATE_RENDEZVOUS": f"file://{rendezvous}",
            "ORCHESTRATE_DEVICE": resources.device,
            "ORCHESTRATE_ATTEMPT": str(spec.attempt),
            "OMP_NUM_THREADS": str(resources.cpus_per_rank),
            "PYTHONUNBUFFERED": "1",
            # Ranks of one host talk over loopback; a host name that does not resolve would stop them.
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if resources.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        return LaunchPlan(
            name=spec.name,
            run_dir=run_dir,
            attempt=spec.attempt,
            command=(*self._worker, str(run_dir)),
            environment={**environment, **self._cluster.environment},
            ranks=resources.ranks,
            cwd=Path.cwd(),
        )

    def problems(self) -> tuple[str, ...]:
        """Say what this host lacks to run trials as the cluster config asks."""
        resources, parallel = self._cluster.resources, self._cluster.limits.parallel
        found = []
        if resources.nodes != 1:
            found.append(f"cluster: resources.nodes: {resources.nodes}: the local launcher has one node; write 1")
        if resources.device == "cuda":
            gpus = num_visible_gpus()
            if resources.ranks_per_node > gpus:
                asked = f"cluster: resources.ranks_per_node: {resources.ranks_per_node}"
                found.append(f"{asked}: each rank needs its own GPU, {gpus} are visible; write less, or `device: cpu`")
            if parallel > 1:
                found.append(f"cluster: limits.parallel: {parallel}: trials would share the same GPUs; write 1")
        return tuple(found)

    def submit(self, plan: LaunchPlan) -> str:
        """Start a supervisor and return the job's id once it holds the trial.

        Raises:
            JobExistsError: a job of the same trial is live, or has used this attempt number.
            LaunchError: it could not be started.
        """
        child = subprocess.Popen(
            (sys.executable, "-m", "orchestrate.launchers.supervisor"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=plan.cwd,
        )
        self._children.append(child)
        answer = _ask(child, plan.to_json())
        if answer.startswith(STARTED):
            return _job_id(plan.name, plan.attempt)
        if answer.startswith(BUSY):
            raise JobExistsError(answer.removeprefix(BUSY).strip())
        child.kill()
        raise LaunchError(f"{plan.name}: the supervisor did not start: {answer.strip() or 'no answer'}")

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name; names never submitted are left out."""
        self._children = [child for child in self._children if child.poll() is None]
        states = {name: self._state(name) for name in names}
        return {name: state for name, state in states.items() if state is not None}

    def cancel(self, jobs: Iterable[str]) -> None:
        """Ask jobs to save and stop; those that have ended already are left alone."""
        for job in jobs:
            run, attempt = self._run(job)
            record = read_json(job_file(run, attempt)) or {}
            if _is_here(record) and process_start_ticks(record["pid"]) == record["start_ticks"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record["pid"], signal.SIGTERM)

    def logs(self, job: str) -> tuple[Path, ...]:
        """Return the log files of a job, rank 0 first."""
        run, attempt = self._run(job)
        folder = run.log_file(attempt, 0).parent
        return tuple(sorted(folder.glob("rank-*.log"), key=lambda path: int(path.stem.partition("-")[2])))

    def _run(self, job: str) -> tuple[RunDir, int]:
        name, _, attempt = job.rpartition(".")
        return RunDir(self._trials / trial_of(name)), int(attempt)

    def _state(self, name: str) -> JobState | None:
        run = RunDir(self._trials / trial_of(name))
        attempts = job_numbers(run)
        if not attempts:
            return None
        attempt = attempts[-1]
        job = _job_id(name, attempt)
        record = read_json(job_file(run, attempt)) or {}
        # The order matters: a supervisor writes its last record before it lets go of the lock.
        life = _sign_of_life(run, record)
        end = read_json(exit_file(run, attempt))
        if end is not None:
            code, ended = int(end["exit_code"]), float(end["ended"])
            return JobState(Phase.FINISHED, job, attempt, f"exit code {code}", exit_code=code, ended=ended)
        phase, evidence = life
        return JobState(phase, job, attempt, evidence)


def num_visible_gpus(devices: Path = Path("/dev")) -> int:
    """Count the GPUs that a process started here would see, without asking CUDA, which takes a second."""
    there = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if chosen is None else min(there, len([part for part in chosen.split(",") if part.strip()]))


def _job_id(name: str, attempt: int) -> str:
    return f"{name}.{attempt}"


def _is_here(record: dict[str, Any]) -> bool:
    return "pid" in record and record.get("boot_id") == boot_id()


def _sign_of_life(run: RunDir, record: dict[str, Any]) -> tuple[Phase, str]:
    host = record.get("host", "")
    if lock_is_held(run):
        return Phase.RUNNING, f"processes of the job hold {run.path.name}/jobs/lock on {host}"
    if _is_here(record):
        if process_start_ticks(record["pid"]) == record["start_ticks"]:
            return Phase.RUNNING, f"its supervisor is process {record['pid']}"
        return Phase.LOST, f"process {record['pid']} is gone and left no exit code; it was killed"
    if host == socket.gethostname():
        return Phase.LOST, "the host has booted since"
    # File locks do not reach over every shared file system, so a free lock proves nothing about another host.
    return Phase.UNKNOWN, f"it was started on {host}, which cannot be asked from {socket.gethostname()}"


def _ask(child: subprocess.Popen[bytes], text: str) -> str:
    """Send a supervisor its plan and return its answer: one line, or all it says if it dies."""
    assert child.stdin is not None and child.stdout is not None
    with child.stdout as output, selectors.DefaultSelector() as selector:
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(text.encode())
        selector.register(output, selectors.EVENT_READ)
        if not selector.select(_ANSWER_SECONDS):
            return ""
        first = output.readline()
        answered = first.startswith((STARTED.encode(), BUSY.encode()))
        return (first if answered else first + output.read()).decode(errors="replace")
