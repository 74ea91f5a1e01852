"""Make a sweep true: look, decide, act, again until nothing is left. All decisions are in `plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrate.config.load import dump_yaml
from orchestrate.errors import LaunchError
from orchestrate.launchers.base import JobExistsError, Launcher, RunSpec, job_name
from orchestrate.runs import create_run_dir, write_text
from orchestrate.store import Event, Store
from orchestrate.sweep.continuation import bring_beginning
from orchestrate.sweep.observe import observe, run_dir_of
from orchestrate.sweep.plan import Cancel, Desired, Observed, Standing, State, Submit, assess, plan, rank_hours
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Pass:
    """What one look at the sweep showed, and what was left to do after acting on it.

    Attributes:
        observed, standing: of each trial, before the actions.
        num_started: attempts that it started.
        stalled: why nothing can happen any more although trials are not final; empty otherwise.
    """

    observed: Mapping[str, Observed]
    standing: Mapping[str, Standing]
    num_started: int
    stalled: str

    @property
    def finished(self) -> bool:
        """Whether every trial is final and every job has ended."""
        is_final = all(place.state.final for place in self.standing.values())
        return is_final and not any(seen.live for seen in self.observed.values())

    def count(self, state: State) -> int:
        """Count the trials in a state."""
        return sum(place.state is state for place in self.standing.values())


class Controller:
    """Apply plans for one sweep. Holds no state that matters: the files, the jobs and the store are all there is.

    Args:
        record: what is wanted.
        runs: folder with `trials/` and `sweeps/`.
        launcher: starts and finds jobs.
        store: where intents and events go; the caller holds the lease of the sweep.
        changed: called when a trial's state or its reason is another one than before.
        clock: unix time.
    """

    def __init__(
        self,
        record: SweepRecord,
        runs: Path,
        launcher: Launcher,
        store: Store,
        *,
        changed: Callable[[TrialEntry, Standing], None] = lambda trial, place: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._record, self._runs, self._launcher, self._store = record, runs, launcher, store
        self._changed, self._clock = changed, clock
        self._trials = {trial.id: trial for trial in record.trials}
        self._completed: dict[str, Observed] = {}
        self._noted: dict[str, Standing] = {}
        self._asked_to_stop: set[str] = set()

    def reconcile(self) -> Pass:
        """Make one pass: look, note what changed, act."""
        observed = self._observe()
        standing = {trial_id: assess(seen) for trial_id, seen in observed.items()}
        self._note(standing)
        self._close_attempts(observed)
        desired = Desired(
            self._record.trial_ids,
            parallel=self._record.parallel,
            gpu_hours=float(self._record.limits["gpu_hours"]),
            elsewhere=self._count_elsewhere(),
        )
        actions = plan(desired, observed, self._clock())
        for action in actions:
            self._apply(action)
        num_started = sum(isinstance(action, Submit) for action in actions)
        return Pass(observed, standing, num_started, _why_stalled(desired, observed, standing))

    def run(self, *, each: Callable[[Pass], None] = lambda _: None, wait: Callable[[float], None] = time.sleep) -> Pass:
        """Reconcile until every trial is final or nothing can be done; `each` sees every pass."""
        while True:
            current = self.reconcile()
            each(current)
            if current.finished or current.stalled:
                return current
            wait(POLL_SECONDS)

    def _observe(self) -> dict[str, Observed]:
        open_ids = [trial_id for trial_id in self._trials if trial_id not in self._completed]
        observed = observe(self._runs, open_ids, self._launcher)
        self._completed |= {trial_id: seen for trial_id, seen in observed.items() if seen.done and not seen.live}
        return {trial_id: observed.get(trial_id) or self._completed[trial_id] for trial_id in self._trials}

    def _count_elsewhere(self) -> int:
        """Count live jobs of other sweeps, which share the cluster's limit."""
        others = [trial_id for trial_id in self._store.open_attempts() if trial_id not in self._trials]
        return sum(job.live for job in self._launcher.poll([job_name(trial_id) for trial_id in others]).values())

    def _note(self, standing: Mapping[str, Standing]) -> None:
        now = self._clock()
        events = [
            Event(now, trial_id, None, str(place.state), str(place.cause) if place.cause else None, place.reason)
            for trial_id, place in standing.items()
            if self._noted.get(trial_id) != place
        ]
        self._noted = dict(standing)
        if events:
            for event in self._store.record_states(events):
                self._changed(self._trials[event.trial], standing[event.trial])

    def _close_attempts(self, observed: Mapping[str, Observed]) -> None:
        for trial_id in self._store.open_attempts():
            seen = observed.get(trial_id)
            if seen is not None and seen.attempts and not seen.live:
                last = seen.attempts[-1]
                self._store.ended(trial_id, last.number, ended=last.ended, exit_code=last.exit_code)

    def _apply(self, action: Submit | Cancel) -> None:
        if isinstance(action, Submit):
            self._submit(action)
        elif action.job not in self._asked_to_stop:
            # Workers act on the first request; asking at every pass would only fill their logs.
            self._asked_to_stop.add(action.job)
            self._launcher.cancel([action.job])

    def _submit(self, action: Submit) -> None:
        trial, sweep, store = self._trials[action.trial_id], self._record.name, self._store
        prepare_run_dir(self._runs, trial)
        store.intend(trial.id, action.attempt, sweep=sweep, now=self._clock(), reason=action.reason)
        spec = RunSpec(trial.id, run_dir_of(self._runs, trial.id).path, action.attempt)
        try:
            job = self._launcher.submit(self._launcher.plan(spec))
        except LaunchError as error:
            store.refused(trial.id, action.attempt, sweep=sweep, now=self._clock(), reason=str(error))
            # If another controller was faster, the next pass sees its job.
            if not isinstance(error, JobExistsError):
                raise
        else:
            store.submitted(trial.id, action.attempt, job, sweep=sweep, now=self._clock())


def _why_stalled(desired: Desired, observed: Mapping[str, Observed], standing: Mapping[str, Standing]) -> str:
    """Say why open trials will stay open; empty while something is live, or may be started later."""
    live = any(seen.live or standing[trial].state is State.RUNNING for trial, seen in observed.items())
    open_trials = sum(not place.state.final for place in standing.values())
    spent = rank_hours(observed)
    if not open_trials or live or not desired.gpu_hours or spent < desired.gpu_hours:
        return ""
    return (
        f"limits.gpu_hours: {desired.gpu_hours:g} allowed, {spent:.2f} spent, {open_trials} trials are open; "
        "raise the limit in the sweep file and run the same command"
    )


def prepare_run_dir(runs: Path, trial: TrialEntry) -> None:
    """Make the RunDir of a trial with what it begins from, or bring what is no identity in its run.yaml up to date.

    Raises:
        RunDirError: the folder cannot be written, or what the trial continues is gone.
    """
    text = dump_yaml(trial.config)
    run = create_run_dir(run_dir_of(runs, trial.id).path, text)
    if run.config_file.read_text() != text:
        write_text(run.config_file, text)  # other workers, engine or data URLs; the numbers are the same
    run.stop_file.unlink(missing_ok=True)
    bring_beginning(runs, trial)


def summary(last: Pass) -> str:
    """Say in a line how many trials are in which state."""
    total = len(last.standing)
    if last.count(State.COMPLETED) == total:
        return "the 1 trial is done" if total == 1 else f"all {total} trials are done"
    counts = [f"{last.count(state)} {state.lower()}" for state in State if last.count(state)]
    return f"{counted(total, 'trial')}: {', '.join(counts)}"


def unfinished(trials: Iterable[TrialEntry], last: Pass) -> list[str]:
    """Describe the trials that ended without a result, a line each."""
    bad = (State.FAILED, State.DIVERGED, State.CANCELLED)
    return [
        f"{trial.label}: {last.standing[trial.id].state}: {last.standing[trial.id].reason}"
        for trial in trials
        if last.standing[trial.id].state in bad
    ]
