"""Stop the jobs of trials, wherever they are, and know when none of them lives any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from orchestrate.launchers.attempts import submission_file
from orchestrate.launchers.base import Launcher, TryLaterError
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.observe import observe, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import TrialEntry

# A scheduler bears a question every few seconds while a person waits for the answer.
_LOOK_AT_LEAST_EVERY_SECONDS = 2.0


class Stopping:
    """Jobs that are asked to save and stop, those that start meanwhile too, and watched until they have.

    Where the place does not answer, stop files ask the jobs that run, and their end records say when they have ended.

    Args:
        runs: folder with `trials/`.
        trials: whose jobs.
        launcher: of the place where the jobs are.
        stopped: called for each trial once none of its jobs lives; with whether one had to be asked.
        wait: pauses between looks.
    """

    def __init__(
        self,
        runs: Path,
        trials: Iterable[TrialEntry],
        launcher: Launcher,
        *,
        stopped: Callable[[TrialEntry, Observed, bool], None],
        wait: Callable[[float], None],
    ) -> None:
        self._runs, self._launcher, self._stopped, self._wait = runs, launcher, stopped, wait
        self._asked: dict[str, set[tuple[str, int]]] = {}
        self._doubts: dict[str, str] = {}
        self.open = {trial.id: trial for trial in trials}

    def watch(self, seconds: float) -> None:
        """Look and ask at least once, and as long as it takes or is wanted; `open` is what still lives then.

        Raises:
            TryLaterError: the place does not answer to the request; stop files are written.
        """
        pause = min(self._launcher.poll_seconds, _LOOK_AT_LEAST_EVERY_SECONDS)
        deadline = time.monotonic() + seconds
        while self.open:
            self._look()
            if not self.open or time.monotonic() >= deadline:
                return
            self._wait(pause)

    def _look(self) -> None:
        for trial_id, seen in observe(self._runs, self.open, self._launcher).items():
            run = run_dir_of(self._runs, trial_id)
            self._doubts[trial_id] = doubt(run, seen)
            live = {(job.job, job.attempt) for job in seen.live_jobs}
            news = live - self._asked.get(trial_id, set())
            if news:
                self._ask(run, seen, sorted(job for job, _ in news))
                self._asked[trial_id] = live
            elif self._doubts[trial_id]:
                _leave_stop_files(run, seen)
                self._asked.setdefault(trial_id, set())
            elif not live:
                self._stopped(self.open.pop(trial_id), seen, trial_id in self._asked)

    def _ask(self, run: RunDir, seen: Observed, jobs: list[str]) -> None:
        try:
            self._launcher.cancel(jobs)
        except TryLaterError:
            _leave_stop_files(run, seen)
            raise

    def is_silent(self, trial_id: str) -> bool:
        """Tell whether nobody knows if a trial that is `open` has a job."""
        return bool(self._doubts[trial_id])

    def why_open(self, trial_id: str) -> str:
        """Say what a trial that is `open` waits for."""
        return self._doubts[trial_id] or "its job is still saving"


def doubt(run: RunDir, seen: Observed) -> str:
    """Say why nobody can tell whether a trial has a job; empty if the launcher knows, or the files leave no doubt."""
    for folder, view in _stages(run, seen):
        if view.job is not None and view.is_unknown and _is_open(folder, view):
            return f"nobody can tell whether it has a job: {view.job.evidence}"
    return ""


def _is_open(folder: RunDir, view: Observed) -> bool:
    """Tell whether a job may live by what the files say: the last one left no end, or something follows it."""
    submission = read_json(submission_file(folder)) or {}
    if view.job is not None and view.job.job:  # the launcher knows of a job, but not how it is
        return True
    if not view.attempts:
        return bool(submission)
    last = view.attempts[-1]
    if view.open_attempt is not None or last.following:
        return True
    # What ends a job by a signal may start it again: preemption and a requeue by hand do.
    if last.job and last.stopped_by and last.verdict is None:
        return True
    has_begun = str(submission.get("job", "")) in {attempt.job for attempt in view.attempts}
    return not has_begun and float(submission.get("time", 0.0)) > last.ended


def _leave_stop_files(run: RunDir, seen: Observed) -> None:
    """Ask the jobs of every stage that live, or may live, in the way that needs no launcher."""
    for folder, view in _stages(run, seen):
        if view.live or (view.is_unknown and _is_open(folder, view)):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.stop_file.touch()


def _stages(run: RunDir, seen: Observed) -> Iterator[tuple[RunDir, Observed]]:
    yield run, seen
    if seen.evaluation is not None:
        yield run.evaluation, seen.evaluation
