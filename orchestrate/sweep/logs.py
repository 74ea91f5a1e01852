"""Find the log that a user wants to read."""

from __future__ import annotations

from pathlib import Path

from orchestrate.errors import RunDirError
from orchestrate.launchers.base import Launcher, attempt_numbers, job_name
from orchestrate.sweep.observe import run_dir_of
from orchestrate.sweep.record import TrialEntry


def find_log(runs: Path, trial: TrialEntry, *, attempt: int, rank: int) -> Path:
    """Return the log of a rank of an attempt; 0 is the last attempt.

    Raises:
        RunDirError: there is none; the message says which there are.
    """
    run = run_dir_of(runs, trial.id)
    numbers = attempt_numbers(run)
    if not numbers:
        raise RunDirError(f"{trial.label}: was never started, so it has no log")
    chosen = attempt or numbers[-1]
    path = run.log_file(chosen, rank)
    if path.exists():
        return path
    there = sorted(str(log.relative_to(run.path)) for log in run.path.glob("logs/attempt-*/*.log"))
    raise RunDirError(f"{path}: no such log; there are: {', '.join(there) or 'none'}")


def job_is_live(launcher: Launcher, trial: TrialEntry) -> bool:
    """Tell whether the trial has a job that may still write."""
    name = job_name(trial.id)
    state = launcher.poll([name]).get(name)
    return state is not None and state.live
