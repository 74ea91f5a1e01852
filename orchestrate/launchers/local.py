"""Run trials as processes of this host."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrate.errors import LaunchError
from orchestrate.launchers.attempts import exit_file, job_file, job_numbers, jobs_folder
from orchestrate.launchers.base import (
    JobExistsError,
    JobState,
    LaunchPlan,
    Phase,
    RunSpec,
    job_folder,
    worker_environment,
)
from orchestrate.launchers.supervisor import BUSY, STARTED, is_here, process_start_ticks, sign_of_life
from orchestrate.runs import RunDir, read_json

if TYPE_CHECKING:
    from orchestrate.launchers.cluster import ClusterConfig, Resources

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

    poll_seconds = 0.5
    array_size = 0

    def __init__(self, cluster: ClusterConfig, runs: Path, *, worker: tuple[str, ...] = WORKER) -> None:
        self._cluster = cluster
        self._trials = runs.absolute() / "trials"
        self._worker = worker
        self._children: list[subprocess.Popen[bytes]] = []

    def plan(self, spec: RunSpec) -> LaunchPlan:
        """Decide everything about a submission, doing nothing."""
        resources = self._cluster.stage_resources(spec.stage)
        cwd = Path.cwd()
        rendezvous = jobs_folder(spec.folder) / f"{spec.attempt}.rendezvous"
        environment = {
            "WORLD_SIZE": str(resources.ranks),
            "LOCAL_WORLD_SIZE": str(resources.ranks),
            "ORCHESTRATE_RENDEZVOUS": f"file://{rendezvous}",
            "ORCHESTRATE_ATTEMPT": str(spec.attempt),
            # Ranks of one host talk over loopback; a host name that does not resolve would stop them.
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return LaunchPlan(
            name=spec.name,
            run_dir=spec.folder.path,
            attempt=spec.attempt,
            command=(*self._worker, str(spec.run_dir.absolute())),
            environment=environment | worker_environment(self._cluster, spec, cwd),
            ranks=resources.ranks,
            cwd=cwd,
            stage=spec.stage,
        )

    def problems(self) -> tuple[str, ...]:
        """Say what this host lacks to run trials as the cluster config asks."""
        found = list(_resource_problems("resources", self._cluster.resources))
        if self._cluster.evaluate:
            found += _resource_problems("evaluate", self._cluster.evaluate)
        parallel = self._cluster.limits.parallel
        if self._cluster.resources.device == "cuda" and parallel > 1:
            found.append(f"cluster: limits.parallel: {parallel}: trials would share the same GPUs; write 1")
        return tuple(found)

    def warnings(self, *, parallel: int) -> tuple[str, ...]:
        """Say whether so many trials at once have more ranks than this host has cores for."""
        resources, cores = self._cluster.resources, len(os.sched_getaffinity(0))
        ranks, cpus = resources.ranks_per_node, resources.cpus_per_rank
        if ranks * cpus * parallel <= cores:
            return ()
        asked = f"{_counted(ranks, 'rank')} x {_counted(cpus, 'CPU')} x {_counted(parallel, 'trial')}"
        return (f"{asked} on {_counted(cores, 'core')}: they will slow each other down",)

    def judge(self, plan: LaunchPlan) -> str:
        """Return nothing: there is no scheduler whom to ask."""
        return ""

    def submit(self, plan: LaunchPlan) -> str:
        """Start a supervisor and return the job's id once it holds the trial.

        Raises:
            JobExistsError: a job of the same trial is live, or has used this attempt number.
            LaunchError: it could not be started.
        """
        # Not a pipe, which nobody would read, nor the pipe of the answer, into which Python writes its warnings.
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                (sys.executable, "-m", "orchestrate.launchers.supervisor"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
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
            errors.seek(0)
            told = (answer + errors.read().decode(errors="replace")).strip()
        raise LaunchError(f"{plan.name}: the supervisor did not start: {told or 'no answer'}")

    def submit_array(self, plans: Sequence[LaunchPlan]) -> list[str]:
        """Start jobs one by one."""
        return [self.submit(plan) for plan in plans]

    def remarks(self) -> tuple[str, ...]:
        """Return nothing: jobs start as they were asked for."""
        return ()

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name; names never submitted are left out."""
        self._children = [child for child in self._children if child.poll() is None]
        states = {name: self._state(name) for name in names}
        return {name: state for name, state in states.items() if state is not None}

    def release(self, jobs: Iterable[str]) -> None:
        """Do nothing: no job waits."""

    def cancel(self, jobs: Iterable[str]) -> None:
        """Ask jobs to save and stop; those that have ended already are left alone."""
        for job in jobs:
            run, attempt = self._run(job)
            record = read_json(job_file(run, attempt)) or {}
            if is_here(record) and process_start_ticks(record["pid"]) == record["start_ticks"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record["pid"], signal.SIGTERM)

    def logs(self, job: str) -> tuple[Path, ...]:
        """Return the log files of a job, rank 0 first."""
        run, attempt = self._run(job)
        folder = run.log_file(attempt, 0).parent
        return tuple(sorted(folder.glob("rank-*.log"), key=lambda path: int(path.stem.partition("-")[2])))

    def _run(self, job: str) -> tuple[RunDir, int]:
        name, _, attempt = job.rpartition(".")
        return job_folder(self._trials, name), int(attempt)

    def _state(self, name: str) -> JobState | None:
        run = job_folder(self._trials, name)
        attempts = job_numbers(run)
        if not attempts:
            return None
        attempt = attempts[-1]
        job = _job_id(name, attempt)
        record = read_json(job_file(run, attempt)) or {}
        # The order matters: a supervisor writes its last record before it lets go of the lock.
        life = sign_of_life(run, record)
        end = read_json(exit_file(run, attempt))
        if end is not None:
            code, ended = int(end["exit_code"]), float(end["ended"])
            return JobState(Phase.FINISHED, job, attempt, f"exit code {code}", exit_code=code, ended=ended)
        phase, evidence = life
        return JobState(phase, job, attempt, evidence)


def _resource_problems(section: str, resources: Resources) -> Iterator[str]:
    if resources.nodes != 1:
        yield f"cluster: {section}.nodes: {resources.nodes}: the local launcher has one node; write 1"
    gpus = num_visible_gpus() if resources.device == "cuda" else resources.ranks_per_node
    if resources.ranks_per_node > gpus:
        asked = f"cluster: {section}.ranks_per_node: {resources.ranks_per_node}"
        yield f"{asked}: each rank needs its own GPU, {gpus} are visible; write less, or `device: cpu`"


def num_visible_gpus(devices: Path = Path("/dev")) -> int:
    """Count the GPUs that a process started here would see, without asking CUDA, which takes a second."""
    there = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if chosen is None else min(there, len([part for part in chosen.split(",") if part.strip()]))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _job_id(name: str, attempt: int) -> str:
    return f"{name}.{attempt}"


def _ask(child: subprocess.Popen[bytes], text: str) -> str:
    """Send a supervisor its plan and return its answer, a line; or all that it says, if it ends without one."""
    assert child.stdin is not None and child.stdout is not None
    said, deadline = b"", time.monotonic() + _ANSWER_SECONDS
    with child.stdout as output, selectors.DefaultSelector() as selector:
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(text.encode())
        selector.register(output, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())) and (line := output.readline()):
            if line.startswith((STARTED.encode(), BUSY.encode())):
                return line.decode(errors="replace")
            said += line
    return said.decode(errors="replace")
