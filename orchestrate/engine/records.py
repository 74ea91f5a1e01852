"""What ranks write about themselves: the heartbeat of rank 0, and why any of them ended."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrate.engine.faults import fault_name, in_a_line
from orchestrate.errors import PreflightError
from orchestrate.exits import Exit
from orchestrate.runs import RunDir, read_json, write_json

_OF_THE_ATTEMPT = ("exit_code", "first_step", "stop_reason", "train_seconds", "saves")


def node_name() -> str:
    """Name this node as the launcher does: hosts may have another name in their own eyes."""
    return os.environ.get("ORCHESTRATE_NODE") or socket.gethostname()


class HeartbeatFiles:
    """status.json and attempts/<n>.json of one attempt, written by its rank 0."""

    def __init__(self, run: RunDir, *, attempt: int, world_size: int) -> None:
        self._run, self._attempt, self._world_size = run, attempt, world_size
        self._started = time.time()

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write both files from the newest facts of the heartbeat."""
        here = {
            "attempt": self._attempt,
            "host": socket.gethostname(),
            "node": node_name(),
            "pid": os.getpid(),
            "world_size": self._world_size,
        }
        defaults = {"step": 0, "total_steps": 0, "images": 0, "loss": None}
        status = {key: value for key, value in facts.items() if key not in _OF_THE_ATTEMPT}
        write_json(self._run.status_file, {**defaults, **status, **here})
        startup = facts.get("startup_seconds")
        attempt = {
            **here,
            "started": self._started,
            "last_seen": facts["time"],
            "first_step": facts.get("first_step", 0),
            "last_step": facts.get("step", 0),
            "exit_code": facts.get("exit_code"),
            "stop_reason": facts.get("stop_reason", ""),
            "startup_seconds": round(sum(startup.values()), 3) if startup else None,
            "train_seconds": round(facts.get("train_seconds", 0.0), 3),
            "saves": facts.get("saves", 0),
        }
        write_json(self._run.attempt_file(self._attempt), attempt)


class RankRecord:
    """attempts/<n>/rank-<r>.json: why a rank ends, unless it is done or saved. The first reason stays."""

    def __init__(self, run: RunDir, *, attempt: int, rank: int) -> None:
        self._run, self._path = run, run.attempts / str(attempt) / f"rank-{rank}.json"
        self._rank, self._written = rank, False

    def write(self, code: int, error: BaseException | str) -> None:
        """Write the record; a disk that takes none must not hide the reason itself."""
        if self._written or code in (Exit.DONE, Exit.CONTINUE):
            return
        self._written = True
        facts = {"rank": self._rank, "node": node_name(), "exit_code": int(code), "time": time.time()}
        if isinstance(error, str):
            facts |= {"error": error, "traceback": ""}
        else:
            facts |= {"error": in_a_line(error), "traceback": fault_name(error)}
        if isinstance(error, PreflightError) and error.check:
            facts["preflight"] = {"check": error.check, "problem": str(error)}
        try:
            if self._run.path.is_dir():  # made where a file system is not mounted, it would pass for the trial's
                write_json(self._path, facts)
        except OSError as failure:
            print(f"{self._path}: {failure.strerror}", flush=True)


def newer_attempt(run: RunDir, own: int) -> int:
    """Return the number of an attempt that was started after ours, in our place; 0 if there is none.

    One that was refused, because we hold the trial, does not count.
    """
    folder = run.path / "jobs"
    numbers = sorted(_start_numbers(folder), reverse=True)
    for number in numbers:
        if number > own and "refused" not in (read_json(folder / f"{number}.start.json") or {}):
            return number
    return 0


def has_other_attempts(run: RunDir, own: int) -> bool:
    """Tell whether a launcher has started other attempts than ours."""
    return any(number != own for number in _start_numbers(run.path / "jobs"))


def _start_numbers(folder: Path) -> list[int]:
    try:
        names = [entry.name.removesuffix(".start.json") for entry in os.scandir(folder) if ".start." in entry.name]
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdigit()]
