"""Make a sweep true: look, decide, act, again until nothing is left. All decisions are in `plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrate.launchers.attempts import job_file, verdict_file
from orchestrate.launchers.base import (
    JobState,
    Launcher,
    Phase,
    TryLaterError,
    job_folder,
    job_name,
    stage_of,
    trial_of,
)
from orchestrate.runs import RunDir, read_json, write_json
from orchestrate.store import Event, Store
from orchestrate.sweep.allowances import AllowanceFiles
from orchestrate.sweep.observe import look, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import (
    Cancel,
    Desired,
    Release,
    Submit,
    divide_hours,
    plan,
    why_stalled,
    why_waiting,
)
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted
from orchestrate.sweep.standing import Standing, State, assess
from orchestrate.sweep.submission import Submitter

# A place that was full is tried again then, even if no job of ours has ended: others have, or the limit was raised.
_FULL_FOR_SECONDS = 300.0


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
        """Whether every trial is final and every job has ended, or waits for a person."""
        is_final = all(place.state.final for place in self.standing.values())
        return is_final and all(job.given_up for seen in self.observed.values() for job in seen.live_jobs)

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
        beside: further trials of the sweep, on which nobody acts now, but whose hours count against its limit.
        next_look_seconds: time until the next pass, if that is longer than the launcher's own.
        changed: called when a trial's state or its reason is another one than before.
        say: called with what a person should know about the place, once for each thing.
        clock: unix time.
    """

    def __init__(
        self,
        record: SweepRecord,
        runs: Path,
        launcher: Launcher,
        store: Store,
        *,
        beside: Sequence[TrialEntry] = (),
        next_look_seconds: float = 0.0,
        changed: Callable[[TrialEntry, Standing], None] = lambda trial, place: None,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._record, self._runs, self._launcher, self._store = record, runs, launcher, store
        self._changed, self._say, self._clock = changed, say, clock
        self._cluster = record.cluster_config()
        self._trials = {trial.id: trial for trial in record.trials}
        self._gpu_hours = float(record.limits["gpu_hours"])
        # Without a limit nobody asks what trials have cost that are acted on no more.
        counted_too = {trial.id: trial for trial in (*record.removed, *beside) if self._gpu_hours}
        self._beside = {trial_id: trial for trial_id, trial in counted_too.items() if trial_id not in self._trials}
        self._allowances = AllowanceFiles(runs / "trials")
        self._next_look_seconds = next_look_seconds
        self._submitter = Submitter(record, runs, launcher, store, clock=clock, say=say)
        self._completed: dict[str, Observed] = {}
        self._noted: dict[str, Standing] = {}
        self._asked_to_stop: set[tuple[str, int]] = set()
        self._verdicts: set[tuple[Path, int]] = set()
        self._room: tuple[int, float] | None = None
        self._told: dict[str, str] = {}
        self._remarked: set[str] = set()

    def reconcile(self) -> Pass:
        """Make one pass: look, note what changed, act."""
        observed, beside, elsewhere = self._look()
        now = self._clock()
        standing = {trial_id: assess(seen) for trial_id, seen in observed.items()}
        self._write_verdicts(observed)
        self._note(observed, standing)
        self._close_attempts(observed)
        self._submitter.fix_code(trial_id for trial_id, place in standing.items() if not place.state.final)
        desired, seen = self._desire(observed, elsewhere, now), observed | beside
        actions = plan(desired, seen, now)
        for action in actions:
            if not isinstance(action, Submit):
                self._nudge(action, seen[action.trial_id])
        submits = [action for action in actions if isinstance(action, Submit)]
        self._allowances.write(divide_hours(desired, seen, submits, now))
        num_started = self._submit(submits, observed, elsewhere)
        if waiting := why_waiting(desired, seen, now):
            self._tell(waiting)
        return Pass(observed, standing, num_started, why_stalled(desired, seen, now))

    def run(self, *, each: Callable[[Pass], None] = lambda _: None, wait: Callable[[float], None] = time.sleep) -> Pass:
        """Reconcile until every trial is final or nothing can be done; `each` sees every pass."""
        while True:
            current = self.reconcile()
            each(current)
            if current.finished or current.stalled:
                return current
            wait(self._launcher.poll_seconds)

    def _look(self) -> tuple[dict[str, Observed], dict[str, Observed], dict[str, JobState]]:
        """Ask once for all jobs, then read the files.

        Returns:
            The trials; those whose hours count too; and by name the live jobs of others, be they those trials' jobs.
        """
        looked_at = (*self._trials, *self._beside)
        open_ids = [trial_id for trial_id in looked_at if trial_id not in self._completed]
        others = [job_name(key) for key in self._store.open_attempts() if trial_of(job_name(key)) not in self._trials]
        evaluates = self._cluster.evaluate is not None
        seen, jobs = look(self._runs, open_ids, self._launcher, evaluates=evaluates, others=others)
        self._tell_silence([job for name, job in jobs.items() if trial_of(name) in self._trials])
        self._completed |= {trial_id: view for trial_id, view in seen.items() if view.done and view.is_settled}
        whole = {trial_id: seen.get(trial_id) or self._completed[trial_id] for trial_id in looked_at}
        observed = {trial_id: whole[trial_id] for trial_id in self._trials}
        beside = {trial_id: whole[trial_id] for trial_id in self._beside}
        return observed, beside, {name: jobs[name] for name in others if name in jobs and jobs[name].live}

    def _desire(self, observed: Mapping[str, Observed], elsewhere: Mapping[str, JobState], now: float) -> Desired:
        resources, evaluate = self._cluster.resources, self._cluster.evaluate
        return Desired(
            self._record.trial_ids,
            parallel=self._record.parallel,
            gpu_hours=self._gpu_hours,
            beside=tuple(self._beside),
            max_jobs=self._cluster.limits.parallel,
            elsewhere=len(elsewhere),
            ranks=resources.ranks,
            evaluate_ranks=evaluate.ranks if evaluate else 0,
            max_ranks=self._cluster.limits.ranks,
            elsewhere_ranks=sum(self._ranks_of(name, job) for name, job in elsewhere.items()),
            room=self._remember_room(_num_live(observed, elsewhere), now),
            next_look_seconds=max(self._launcher.poll_seconds, self._next_look_seconds),
        )

    def _ranks_of(self, name: str, job: JobState) -> int:
        """Return the ranks of another sweep's job; one that has not begun is taken to be like ours."""
        record = read_json(job_file(job_folder(self._runs / "trials", name), job.attempt)) or {}
        return int(record.get("ranks") or self._cluster.resources.ranks)

    def _remember_room(self, num_live: int, now: float) -> int | None:
        """Return how many jobs the place was found to take, until one of them ends or it may have changed."""
        if self._room is not None and (num_live < self._room[0] or now - self._room[1] >= _FULL_FOR_SECONDS):
            self._room = None
        return self._room[0] if self._room else None

    def _submit(
        self, submits: Sequence[Submit], observed: Mapping[str, Observed], elsewhere: Mapping[str, JobState]
    ) -> int:
        if not submits:
            return 0
        came = self._submitter.start(submits)
        for text in self._launcher.remarks():
            self._remark(text)
        if came.refusal is not None and came.refusal.full:
            num_live = _num_live(observed, elsewhere) + came.num_started
            self._room = (num_live, self._clock())
            self._tell(f"the place takes no more than {num_live} jobs now: {came.refusal}; more follow when one ends")
        elif came.refusal is not None:
            self._tell(f"could not submit, will try again: {came.refusal}")
        else:
            self._told.clear()
        return came.num_started

    def _nudge(self, action: Cancel | Release, seen: Observed) -> None:
        """Ask a job to stop, once, or to start."""
        try:
            if isinstance(action, Release):
                self._launcher.release([action.job])
                return
            # Workers act on the first request; asking at every pass would only fill their logs.
            job = next((action.job, job.attempt) for job in seen.live_jobs if job.job == action.job)
            if job not in self._asked_to_stop:
                self._launcher.cancel([action.job])
                self._asked_to_stop.add(job)
                trial = self._trials.get(action.trial_id) or self._beside[action.trial_id]
                self._say(f"{trial.label}: asked to save and stop: {action.reason}")
        except TryLaterError as error:
            self._tell(f"could not ask job {action.job}, will try again: {error}")

    def _tell_silence(self, jobs: Sequence[JobState]) -> None:
        """Say that the launcher has no answer to anything, when that begins."""
        answers = {job.evidence if job.phase is Phase.UNKNOWN else "" for job in jobs}
        if answers and "" not in answers:
            self._tell(f"cannot ask about jobs, so nothing is started: {min(answers)}", about="silence")
        else:
            self._told.pop("silence", None)

    def _tell(self, text: str, *, about: str = "") -> None:
        """Say something about the place, unless it was the last thing said of this kind."""
        if self._told.get(about or text) is None:
            self._told[about or text] = text
            self._say(text)

    def _remark(self, text: str) -> None:
        """Say something about submissions that went through, once for all of them."""
        if text not in self._remarked:
            self._remarked.add(text)
            self._say(text)

    def _write_verdicts(self, observed: Mapping[str, Observed]) -> None:
        """Keep what the scheduler says of ended attempts, which it forgets within minutes."""
        for trial_id, seen in observed.items():
            if seen.job is not None and seen.job.verdicts:
                self._write_verdicts_of(run_dir_of(self._runs, trial_id), seen, seen.job.verdicts)
            view = seen.evaluation
            if view is not None and view.job is not None and view.job.verdicts:
                self._write_verdicts_of(run_dir_of(self._runs, trial_id).evaluation, view, view.job.verdicts)

    def _write_verdicts_of(self, run: RunDir, seen: Observed, said: Collection[int]) -> None:
        for attempt in seen.attempts:
            key = (run.path, attempt.number)
            if attempt.number in said and attempt.verdict is not None and key not in self._verdicts:
                self._verdicts.add(key)
                path = verdict_file(run, attempt.number)
                if not path.exists():
                    write_json(path, asdict(attempt.verdict) | {"asked": attempt.asked_to_end})

    def _note(self, observed: Mapping[str, Observed], standing: Mapping[str, Standing]) -> None:
        """Store what is new; that a job could not be asked about is no news of the trial."""
        now = self._clock()
        known = {trial_id: place for trial_id, place in standing.items() if not _is_silent(observed[trial_id])}
        events = [
            Event(now, trial_id, None, str(place.state), str(place.cause) if place.cause else None, place.reason)
            for trial_id, place in known.items()
            if self._noted.get(trial_id) != place
        ]
        self._noted |= known
        if events:
            for event in self._store.record_states(events):
                self._changed(self._trials[event.trial], standing[event.trial])

    def _close_attempts(self, observed: Mapping[str, Observed]) -> None:
        for key in self._store.open_attempts():
            name = job_name(key)
            seen = observed.get(trial_of(name))
            view = seen.evaluation if seen is not None and stage_of(name) == "evaluate" else seen
            if view is not None and view.attempts and not view.holds_place:
                last = view.attempts[-1]
                self._store.ended(key, last.number, ended=last.ended, exit_code=last.exit_code)


def _is_silent(seen: Observed) -> bool:
    """Tell whether nothing was learned of a trial, not even of a job that may live."""
    return seen.is_unknown and not seen.may_live


def _num_live(observed: Mapping[str, Observed], elsewhere: Mapping[str, JobState]) -> int:
    return sum(seen.num_places for seen in observed.values()) + len(elsewhere)


def summary(last: Pass) -> str:
    """Say in a line how many trials are in which state."""
    total = len(last.standing)
    if last.count(State.COMPLETED) == total:
        return "the 1 trial is done" if total == 1 else f"all {total} trials are done"
    counts = [f"{last.count(state)} {state.lower()}" for state in State if last.count(state)]
    return f"{counted(total, 'trial')}: {', '.join(counts)}"


def unfinished(trials: Iterable[TrialEntry], last: Pass) -> list[str]:
    """Describe the trials that ended without a result, a line each."""
    bad = (State.FAILED, State.DIVERGED, State.HELD, State.CANCELLED)
    return [
        f"{trial.label}: {last.standing[trial.id].state}: {last.standing[trial.id].reason}"
        for trial in trials
        if last.standing[trial.id].state in bad
    ]
