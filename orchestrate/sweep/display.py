"""How a running sweep shows itself: a line for each change, or a live table."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

from orchestrate.sweep.controller import Pass
from orchestrate.sweep.observe import done_record, run_dir_of
from orchestrate.sweep.record import SweepRecord, TrialEntry
from orchestrate.sweep.standing import Standing, State
from orchestrate.sweep.status import TrialStatus, objective_value, status_table, sweep_status

# Lines of the live view that are not trials: headline, blanks, header, the log line above.
_FRAME_LINES = 6
_MOST_INTERESTING = (
    State.RUNNING, State.QUEUED, State.INTERRUPTED, State.TRAINED, State.HELD, State.FAILED, State.DIVERGED,
)  # fmt: skip


class Lines:
    """A plain line for each change of a trial; fit for logs and pipes."""

    def __init__(self, record: SweepRecord, runs: Path, console: Console) -> None:
        self._record, self._runs, self._console = record, runs, console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Leave nothing to close."""

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def changed(self, trial: TrialEntry, place: Standing) -> None:
        """Print the new state of a trial; one that merely waits is not worth a line."""
        if place.state is State.PENDING:
            return
        clock = time.strftime("%H:%M:%S")
        self.line(f"{clock}  {trial.label}  {place.state}  {self._detail(trial, place)}".rstrip())

    def looked(self, current: Pass) -> None:
        """Print nothing: lines are for changes."""

    def _detail(self, trial: TrialEntry, place: Standing) -> str:
        if place.state is State.COMPLETED:
            done = done_record(run_dir_of(self._runs, trial.id)) or {}
            value = objective_value(done.get("metrics") or {}, self._record.objective["metric"])
            return "" if value is None else f"{self._record.objective['metric']} {value:.4f}"
        if place.state in (State.RUNNING, State.QUEUED):
            return place.reason.partition(":")[0]
        return place.reason


class LiveTable(Lines):
    """The table of `orchestrate status`, drawn anew at every pass, below the lines."""

    def __init__(self, record: SweepRecord, runs: Path, console: Console) -> None:
        super().__init__(record, runs, console)
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Leave the last table on the screen."""
        self._live.stop()

    def looked(self, current: Pass) -> None:
        """Draw the table."""
        rows = sweep_status(self._record, self._runs, current.observed)
        room = max(3, shutil.get_terminal_size().lines - _FRAME_LINES)
        shown = rows if len(rows) <= room else sorted(rows, key=_interest)
        self._live.update(status_table(self._record, shown, limit=room), refresh=True)


def _interest(row: TrialStatus) -> int:
    return _MOST_INTERESTING.index(row.state) if row.state in _MOST_INTERESTING else len(_MOST_INTERESTING)
