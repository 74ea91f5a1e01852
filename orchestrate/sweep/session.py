"""One `orchestrate sweep`: checks, the lease, the loop, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrate.launchers.base import Launcher
from orchestrate.store import Store, open_store, store_path
from orchestrate.sweep.adopt import adopt
from orchestrate.sweep.batches import advice
from orchestrate.sweep.controller import Controller, Pass, summary, unfinished
from orchestrate.sweep.interventions import Forgive, forgive_machine_faults
from orchestrate.sweep.lease import lease
from orchestrate.sweep.observe import observe
from orchestrate.sweep.preflight import check_start
from orchestrate.sweep.record import (
    SweepRecord,
    TrialEntry,
    counted,
    find_record,
    record_path,
    save_record,
    sweep_names,
)
from orchestrate.sweep.standing import Standing, State

# sweep folder, trials folder -> the page
WriteReport = Callable[[Path, Path], Path]
# runs, trials -> the place where they were has no job of theirs any more, or an error
Leave = Callable[[Path, Iterable[TrialEntry]], None]

# Touched by single passes, which a timer may ask for: what lies between two of them is when the next one comes.
_LAST_LOOK = "last_look"
# A pause of days says nothing of the next pass; until then every job keeps to its own allowance.
_LONGEST_LOOK_SECONDS = 3600.0


class Display(Protocol):
    """Where a sweep shows what it does."""

    def line(self, text: str) -> None:
        """Print a line."""

    def changed(self, trial: TrialEntry, place: Standing) -> None:
        """Show that a trial is in another state."""

    def looked(self, current: Pass) -> None:
        """Show what a pass saw."""


@dataclass(frozen=True)
class Session:
    """What a command needs to make a sweep true.

    Attributes:
        runs: folder with `trials/` and `sweeps/`.
        launcher: starts and finds jobs.
        display: for people.
        check_data: raises DataError if the dataset at a URL is not whole.
        write_report: makes the page of a sweep.
        wait: pauses between passes.
    """

    runs: Path
    launcher: Launcher
    display: Display
    check_data: Callable[[str], None]
    write_report: WriteReport
    wait: Callable[[float], None] = time.sleep

    def make_true(
        self,
        record: SweepRecord,
        *,
        once: bool = False,
        only: Collection[str] = (),
        leave: Leave | None = None,
        forgive: Forgive | None = None,
    ) -> bool:
        """Run a sweep to its end, or make a single pass; return whether every trial is done.

        A run to the end, which a person asked for, gives trials that a machine let down a fresh set of retries; single
        passes, which a timer may ask for again and again, do not.

        Args:
            record: what is wanted.
            once: make one pass and leave the jobs to themselves.
            only: ids of the trials to act on; all if empty.
            leave: sees to it that no job lives at the place of before; called before sweep.json names this one.
            forgive: takes up trials again that a person named; called once nothing can refuse the sweep any more.

        Raises:
            ConfigError: it could not run; nothing was written.
            LeaseHeldError: another command controls it.
        """
        check_start(record, self.runs, self.launcher, check_data=self.check_data)
        with lease(record_path(self.runs, record.name).parent), opened_store(self.runs) as store:
            if leave is not None:
                following = record.following(find_record(self.runs, record.name))
                leave(self.runs, (following.only(only) if only else following).trials)
            record, is_new = self._keep(record)
            store.record_sweep(record.name, record.trial_ids, now=record.created)
            beside = [trial for trial in (*record.trials, *record.removed) if only and trial.id not in only]
            record = record.only(only) if only else record
            self._announce(record)
            for mercy in (forgive, None if once else forgive_machine_faults):
                if mercy is not None:
                    self._take_up(record, mercy)
            show = self.display
            controller = Controller(
                record,
                self.runs,
                self.launcher,
                store,
                beside=beside,
                next_look_seconds=_since_last_look(record_path(self.runs, record.name).parent) if once else 0.0,
                changed=show.changed,
                say=show.line,
            )
            if once:
                last = controller.reconcile()
                self.display.looked(last)
            else:
                last = controller.run(each=self.display.looked, wait=self.wait)
            return self._conclude(record, last, is_new=is_new, once=once)

    def _take_up(self, record: SweepRecord, forgive: Forgive) -> None:
        evaluates = record.cluster_config().evaluate is not None
        observed = observe(self.runs, record.trial_ids, self.launcher, evaluates=evaluates)
        for trial in forgive(self.runs, record.trials, observed):
            self.display.line(f"{trial.label}: taken up again")

    def _announce(self, record: SweepRecord) -> None:
        """Say what is about to be trained, and what will make it slow; nothing if all is done."""
        due = [trial for trial in record.trials if not _finished_at(self.runs, trial)]
        if due:
            size = counted(len(record.trials), "trial")
            self.display.line(f"{record.name}: {size}, {record.parallel} at once, in {self.runs}")
            for warning in (*self.launcher.warnings(parallel=min(record.parallel, len(due))), *advice(record, due)):
                self.display.line(f"warning: {warning}")

    def _keep(self, record: SweepRecord) -> tuple[SweepRecord, bool]:
        """Write sweep.json unless all is done as before; say which trials left the sweep.

        Returns:
            The record that counts, and whether it wants something new.
        """
        before = find_record(self.runs, record.name)
        record = record.following(before)
        known = {trial.id for trial in before.removed} if before else set()
        for trial in record.removed:
            if trial.id not in known:
                self.display.line(
                    f"{trial.label}: no longer in the sweep, kept; `orchestrate cancel {trial.id[:8]}` stops it"
                )
        is_new = before is None or not record.wants_the_same(before)
        if before is not None and not is_new and all(_finished_at(self.runs, trial) for trial in record.trials):
            return before, False  # it says at which commit the trials were trained
        save_record(self.runs, record)
        return record, is_new

    def _conclude(self, record: SweepRecord, last: Pass, *, is_new: bool, once: bool) -> bool:
        say = self.display.line
        say(summary(last))
        for text in unfinished(record.trials, last):
            say(f"  {text}")
        if last.stalled:
            say(last.stalled)
        if last.finished or last.stalled:
            self._report(record, last, is_new=is_new)
        elif once:
            say(f"{last.num_started} more were started, and go on by themselves; `orchestrate status {record.name}`")
        return last.count(State.COMPLETED) == len(last.standing)

    def _report(self, record: SweepRecord, last: Pass, *, is_new: bool) -> None:
        folder = record_path(self.runs, record.name).parent
        page = folder / "report" / "index.html"
        # sweep.json too: a command that was killed before its report leaves a new record beside an old page.
        asked = record_path(self.runs, record.name).stat().st_mtime
        newest = max(asked, *(_finished_at(self.runs, trial) for trial in record.trials))
        if is_new or not page.exists() or page.stat().st_mtime < newest:
            page = self.write_report(folder, self.runs / "trials")
        self.display.line(f"report: {page}")


def _finished_at(runs: Path, trial: TrialEntry) -> float:
    done = runs / "trials" / trial.id / "results" / "done.json"
    return done.stat().st_mtime if done.exists() else 0.0


def _since_last_look(folder: Path) -> float:
    """Return the time since the last single pass over a sweep, 0 if there was none, and note that one is made now."""
    mark = folder / _LAST_LOOK
    since = time.time() - mark.stat().st_mtime if mark.exists() else 0.0
    mark.touch()
    return min(max(0.0, since), _LONGEST_LOOK_SECONDS)


@contextmanager
def opened_store(runs: Path) -> Iterator[Store]:
    """Open the store of a runs folder; a missing one is first filled from the folders."""
    is_missing = not store_path(runs).exists()
    with open_store(store_path(runs)) as store:
        if is_missing and sweep_names(runs):
            adopt(runs, store)
        yield store
