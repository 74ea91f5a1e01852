"""Run directories, launchers and processes of the tests of the control plane."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrate.launchers.base import JobState, LaunchPlan, RunSpec, job_name
from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.local import LocalLauncher
from orchestrate.launchers.supervisor import process_start_ticks

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
# Starting an interpreter takes 0.1 s on a free core; the suite may share two cores with other work.
PATIENCE_SECONDS = 60.0


def cluster(*, ranks: int = 2, parallel: int = 1, **environment: str) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "launcher": "local",
            "resources": {"ranks_per_node": ranks},
            "limits": {"parallel": parallel, "min_free_gb": 0.0},
            "environment": environment,
        }
    )


def launcher(runs: Path, *, ranks: int = 2, worker: tuple[str, ...] = STAND_IN) -> LocalLauncher:
    return LocalLauncher(cluster(ranks=ranks), runs, worker=worker)


def trial_dir(runs: Path, trial: str, *script: dict[str, str]) -> Path:
    """Make a RunDir whose attempts do what the script says."""
    path = runs / "trials" / trial
    path.mkdir(parents=True, exist_ok=True)
    if script:
        (path / "script.json").write_text(json.dumps(script))
    return path


def start(jobs: LocalLauncher, runs: Path, trial: str, attempt: int = 1) -> LaunchPlan:
    plan = jobs.plan(RunSpec(trial, runs / "trials" / trial, attempt))
    jobs.submit(plan)
    return plan


def state(jobs: LocalLauncher, trial: str) -> JobState:
    return jobs.poll([job_name(trial)])[job_name(trial)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again; fail if it does not come true in a time far beyond any that is needed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def wait_for_end(jobs: LocalLauncher, trial: str) -> JobState:
    wait_until(lambda: not state(jobs, trial).live, f"{trial} ends")
    return state(jobs, trial)


def rank_pids(runs: Path, trial: str, *, attempt: int = 1, ranks: int = 2) -> list[int]:
    """Wait until every rank says that it is ready, and return their process ids."""
    files = [runs / "trials" / trial / "ready" / f"{attempt}-{rank}" for rank in range(ranks)]
    wait_until(lambda: all(file.exists() for file in files), f"ranks of {trial} are ready")
    return [int(file.read_text()) for file in files]


def supervisor_pid(runs: Path, trial: str, attempt: int = 1) -> int:
    return int(json.loads((runs / "trials" / trial / "jobs" / f"{attempt}.start.json").read_text())["pid"])


def is_gone(pid: int) -> bool:
    return process_start_ticks(pid) is None


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def kill_supervisors(runs: Path) -> None:
    """End every job that a test left behind; ranks die with their supervisor."""
    for path in runs.glob("trials/**/jobs/*.start.json"):
        record = json.loads(path.read_text())
        if "pid" in record and process_start_ticks(record["pid"]) == record["start_ticks"]:
            os.kill(record["pid"], signal.SIGKILL)
