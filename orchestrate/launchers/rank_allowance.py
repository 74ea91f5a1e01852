"""How much a job may spend, so that a limit on hours holds while nobody watches."""

from __future__ import annotations

from pathlib import Path

from orchestrate.launchers.attempts import jobs_folder, load_attempts
from orchestrate.runs import RunDir, read_json


def allowance_file(run: RunDir) -> Path:
    """Record of the rank-seconds that all attempts of a job folder together may have spent; written by a controller."""
    return jobs_folder(run) / "allowance.json"


def read_allowance(run: RunDir) -> float | None:
    """Return the rank-seconds that are allowed, or None if nobody bounds them."""
    seconds = (read_json(allowance_file(run)) or {}).get("rank_seconds")
    return None if seconds is None else float(seconds)


def seconds_left(run: RunDir, attempt: int, *, ranks: int, now: float) -> float:
    """Return for how long the ranks of an attempt may still run.

    Args:
        run: folder of the job's records.
        attempt: number of the attempt that runs; all before it have ended.
        ranks: of the attempt.
        now: unix time.

    Returns:
        Seconds from now, infinity without an allowance; below 0 if it is overspent.
    """
    allowed = read_allowance(run)
    if allowed is None:
        return float("inf")
    attempts = load_attempts(run)
    before = sum(each.rank_seconds for each in attempts if each.number != attempt)
    started = next((each.started for each in attempts if each.number == attempt), now)
    return (allowed - before) / ranks - max(0.0, now - started)
