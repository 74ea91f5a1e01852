"""Look at the files and jobs of trials, and say what was seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrate.launchers.base import Launcher, checkpoint_step, job_name, load_attempts
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.plan import Observed


def run_dir_of(runs: Path, trial_id: str) -> RunDir:
    """Return the RunDir of a trial, which need not exist."""
    return RunDir(runs / "trials" / trial_id)


def resumed_file(run: RunDir) -> Path:
    """Record of the last time a person resumed the trial: attempts up to `after_attempt` no longer count."""
    return run.path / "resumed.json"


def done_record(run: RunDir) -> dict[str, Any] | None:
    """Return results/done.json if it proves that this trial, and no other, is complete."""
    done = read_json(run.done_file)
    return done if done is not None and done.get("fingerprint") == run.path.name else None


def observe(runs: Path, trial_ids: Iterable[str], launcher: Launcher) -> dict[str, Observed]:
    """Look at trials: one question to the launcher for all of them, then the files of each.

    The launcher is asked first: a job that ends meanwhile is seen as live, and its end is seen next time.
    """
    ids = list(trial_ids)
    jobs = launcher.poll([job_name(trial_id) for trial_id in ids])
    seen = {}
    for trial_id in ids:
        run = run_dir_of(runs, trial_id)
        done = done_record(run)
        seen[trial_id] = Observed(
            done=done is not None,
            finished=float((done or {}).get("finished", 0.0)),
            cancelled=run.cancelled_file.exists(),
            job=jobs.get(job_name(trial_id)),
            attempts=load_attempts(run),
            checkpoint_step=checkpoint_step(run),
            forgiven=int((read_json(resumed_file(run)) or {}).get("after_attempt", 0)),
        )
    return seen
