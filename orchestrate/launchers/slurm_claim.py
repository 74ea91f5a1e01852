"""The numbers of attempts: taken once, by whoever creates the record of the start first."""

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrate.launchers.attempts import attempt_numbers, exit_file, job_file, job_numbers, jobs_folder
from orchestrate.runs import RunDir, read_json

# Without a heartbeat for so long, a job is not seen as live; workers and keepers give one every few seconds.
STALE_SECONDS = 30.0


def claim_attempt(run: RunDir, facts: Mapping[str, Any]) -> int:
    """Take the next free number of an attempt, with a record of its start; return the number."""
    jobs_folder(run).mkdir(parents=True, exist_ok=True)
    while True:
        number = max(attempt_numbers(run), default=0) + 1
        if create_json(job_file(run, number), {**facts, "attempt": number}):
            return number


def create_json(path: Path, value: Mapping[str, Any]) -> bool:
    """Create a whole JSON file; return False, and leave it alone, if it exists. Holds on network file systems too."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        return aside.stat().st_nlink == 2  # a server may have done it and its answer was lost: asked twice, it refuses
    finally:
        aside.unlink()
    return True


def open_attempts(run: RunDir) -> list[tuple[int, dict[str, Any]]]:
    """Return the attempts whose start is recorded and whose end is not, with the record of the start."""
    numbers = (number for number in job_numbers(run) if not exit_file(run, number).exists())
    return [(number, read_json(job_file(run, number)) or {}) for number in numbers]


def live_holder(run: RunDir, job: str) -> str:
    """Say which other job works on the trial; empty if none does.

    An earlier run of the same job is over, whatever its last heartbeat: Slurm has started this one in its place.
    """
    others = [(number, start) for number, start in open_attempts(run) if start.get("job") != job]
    now = _clock(run) if others else 0.0
    for number, start in others:
        age = now - last_beat(run, number)
        if age < STALE_SECONDS:
            who = f"job {start.get('job')}" if start.get("job") else f"a job on {start.get('host', 'another host')}"
            return f"{who} works on it as attempt {number}, last seen {max(0.0, age):.0f} s ago"
    return ""


def last_beat(run: RunDir, number: int) -> float:
    """Return when an attempt last wrote a file, by the clock of the file system; 0 if it never did."""
    return max(_changed(run.attempt_file(number)), _changed(job_file(run, number)))


def beat(run: RunDir, number: int) -> None:
    """Show that whoever keeps an attempt lives, also while its workers still start."""
    os.utime(job_file(run, number))


def _changed(path: Path) -> float:
    try:
        with path.open() as file:  # opened, as network file systems look for what is new then
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _clock(run: RunDir) -> float:
    """Read the clock that file times are from: hosts' own clocks may differ by minutes."""
    path = jobs_folder(run) / f".clock.{secrets.token_hex(8)}"
    try:
        path.touch()
        return path.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        path.unlink(missing_ok=True)
