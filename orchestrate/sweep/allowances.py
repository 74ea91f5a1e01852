"""Tell each job how much it may spend, so that a limit on hours holds though nobody watches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from orchestrate.launchers.base import job_folder, job_name
from orchestrate.launchers.rank_allowance import allowance_file, read_allowance
from orchestrate.runs import RunDir, write_json

# What each job may spend changes a little at every pass, as others end a moment early or late.
_WORTH_WRITING = 0.02


class AllowanceFiles:
    """Allowances in the folders of jobs; one that hardly changes is left as it is.

    Args:
        trials: folder of the RunDirs.
    """

    def __init__(self, trials: Path) -> None:
        self._trials = trials
        self._written: dict[tuple[str, str], float] = {}

    def write(self, allowances: Mapping[tuple[str, str], float]) -> None:
        """Write the rank-seconds of jobs, by trial and stage; infinity takes away what bounded a job before."""
        for key, seconds in allowances.items():
            run = job_folder(self._trials, job_name(*key))
            before = self._written[key] if key in self._written else _read(run)
            if not math.isclose(before, seconds, rel_tol=_WORTH_WRITING):
                _replace(run, seconds)
                before = seconds
            self._written[key] = before


def _read(run: RunDir) -> float:
    allowed = read_allowance(run)
    return float("inf") if allowed is None else allowed


def _replace(run: RunDir, seconds: float) -> None:
    if seconds == float("inf"):
        allowance_file(run).unlink(missing_ok=True)
    else:
        write_json(allowance_file(run), {"rank_seconds": seconds})
