"""Look at Slurm and at what its jobs left, and say where each of them is."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrate.launchers.base import JobState, Phase, TryLaterError, job_folder, trial_of
from orchestrate.launchers.slurm_arrays import ArrayFolders
from orchestrate.launchers.slurm_commands import COMMAND_NOT_FOUND, Commands, why_silent
from orchestrate.launchers.slurm_queue import ACCOUNTING_FORMAT, QUEUE_FORMAT, Row, Run, parse_accounting, parse_queue
from orchestrate.launchers.slurm_state import Records, Sight, job_state, read_records

# Accounting may lag behind by minutes, and may never have heard of a job: so often it is asked about each attempt.
_QUESTIONS = 20
# Before the start of the oldest run in question: clocks differ.
_CLOCK_SECONDS = 300.0


class SlurmWatch:
    """One question for the states of all jobs; remembers only what need not be asked again.

    Args:
        trials: folder of the RunDirs.
        arrays: whose elements are jobs of trials.
        mark: end of the comments of our jobs; another folder may hold the same trial, whose job has the same name.
        commands: Slurm.
        clock: unix time.

    Attributes:
        launch_failed: ids of the jobs that were held at the last look because a node could not launch them.
    """

    def __init__(
        self, trials: Path, arrays: ArrayFolders, *, mark: str, commands: Commands, clock: Callable[[], float]
    ) -> None:
        self._trials, self._arrays, self._mark = trials, arrays, mark
        self._commands, self._clock = commands, clock
        self.launch_failed: frozenset[str] = frozenset()
        self._has_accounting = True
        self._settled: defaultdict[str, set[int]] = defaultdict(set)
        self._questions: Counter[tuple[str, int]] = Counter()

    def states(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name, with one squeue and at most one sacct for all of them."""
        asked = list(dict.fromkeys(names))
        now = self._clock()
        try:
            queue = self.queue()
        except TryLaterError as error:
            return {name: JobState(Phase.UNKNOWN, "", 0, str(error)) for name in asked}
        rows = defaultdict(list)
        for row in queue:
            rows[row.name].append(row)
        # A trial that never began has no folder; one listing says it of thousands.
        begun = {path.name for path in os.scandir(self._trials)} if self._trials.exists() else set()
        known = [name for name in asked if name in rows or trial_of(name) in begun]
        sights = {name: self._sight(name, rows.get(name, ()), now) for name in known}
        accounting = self._account(sights)
        states = {
            name: job_state(replace(sight, accounting=accounting.get(name, ()))) for name, sight in sights.items()
        }
        return {name: state for name, state in states.items() if state is not None}

    def queue(self) -> list[Row]:
        """Read all jobs of this user.

        Raises:
            TryLaterError: squeue did not answer.
        """
        user = str(os.getuid())
        options = ("--noheader", "--array", "--states=all", f"--user={user}", f"--Format={QUEUE_FORMAT}")
        answer = self._commands.run("squeue", *options)
        if answer.code:
            raise TryLaterError(f"squeue: {why_silent(answer)}")
        try:
            own = [row for row in parse_queue(answer.out) if not self._is_foreign(row)]
            self.launch_failed = frozenset(row.job for row in own if row.launch_failed)
            return self._arrays.named(own)
        except ValueError as error:
            raise TryLaterError(str(error)) from error

    def _is_foreign(self, row: Row) -> bool:
        """Tell whether a job works on another folder; one without a mark counts as ours, as sites change comments."""
        mark = re.search(r"@([0-9a-f]{8})$", row.comment)
        return mark is not None and mark[1] != self._mark

    def _sight(self, name: str, rows: Sequence[Row], now: float) -> Sight:
        folder = job_folder(self._trials, name)
        records = read_records(folder, self._settled[name])
        self._settle(name, records)
        return Sight(rows, records.runs, records.next_attempt, records.submission, now, records.dropped)

    def _settle(self, name: str, records: Records) -> None:
        """Remember which attempts have nothing more to tell."""
        for run in records.runs[:-1]:
            if run.verdict or run.tells_why or self._questions[name, run.number] >= _QUESTIONS:
                self._settled[name].add(run.number)

    def _account(self, sights: dict[str, Sight]) -> dict[str, list[Run]]:
        """Ask accounting about all runs whose end is not explained; where there is no accounting, only once."""
        since, asked = self._clock(), defaultdict(set)
        for name, sight in sights.items():
            for number, job, time_ in _questions(sight):
                if self._questions[name, number] < _QUESTIONS:
                    since = min(since, time_)
                    asked[name].add((number, job))
        if not asked:
            return {}
        runs = self._accounting(since - _CLOCK_SECONDS) if self._has_accounting else {}
        if runs is None:
            return {}
        # What has no answer, because there is none to be had or none yet, is not asked for ever.
        self._questions.update((name, number) for name, about in asked.items() for number, _ in about)
        found = {name: [run for _, job in about for run in runs.get(job, ())] for name, about in asked.items()}
        return {name: list(dict.fromkeys(own)) for name, own in found.items()}

    def _accounting(self, since: float) -> Mapping[str, list[Run]] | None:
        """Return the runs of all jobs by their ids; None without an answer."""
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
        what = ("--allocations", "--duplicates", f"--user={os.getuid()}", f"--starttime={start}")
        answer = self._commands.run("sacct", *what, "--noheader", "--parsable2", f"--format={ACCOUNTING_FORMAT}")
        if answer.code:
            self._has_accounting = "disabled" not in answer.complaint and answer.code != COMMAND_NOT_FOUND
            return None
        runs = defaultdict(list)
        for run in parse_accounting(answer.out):
            for job in {run.job, run.raw_job}:
                runs[job].append(run)
        return runs


def _questions(sight: Sight) -> Iterator[tuple[int, str, float]]:
    """List what only accounting may know: the number of an attempt, its job, and a time before which it did not run."""
    for run in sight.open_runs:
        yield run.number, run.job, run.started
    if (gone := sight.vanished) is not None:
        yield sight.next_attempt, gone.job, gone.time
