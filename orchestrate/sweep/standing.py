"""Where a trial stands, by what was seen of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrate.exits import Exit
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.causes import Cause
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.retries import Outcome, advanced, judge

# A job ends a moment after its results are there; libraries can hang on their way out.
_LONGEST_ENDING_SECONDS = 120.0
# Milestones of a training that goes on are evaluated in bunches, not each by a job of its own.
_PAUSE_BETWEEN_EVALUATIONS_SECONDS = 60.0


class State(StrEnum):
    """Where a trial is. The last five are final until a person says otherwise."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    TRAINED = "TRAINED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    DIVERGED = "DIVERGED"
    HELD = "HELD"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """Whether a sweep has nothing left to do for the trial."""
        return self in (State.COMPLETED, State.FAILED, State.DIVERGED, State.HELD, State.CANCELLED)


_STATES = {
    Outcome.RETRY: State.INTERRUPTED,
    Outcome.FAILED: State.FAILED,
    Outcome.DIVERGED: State.DIVERGED,
    Outcome.HELD: State.HELD,
}


@dataclass(frozen=True)
class Standing:
    """The state of a trial with the reason, and the next attempt where one is due.

    Attributes:
        state, cause, reason: what, why in a word, why in a sentence.
        next_attempt: its number, or None if nothing is to be started.
        not_before: unix time until which a retry waits.
    """

    state: State
    reason: str
    cause: Cause | None = None
    next_attempt: int | None = None
    not_before: float = 0.0


def assess(seen: Observed) -> Standing:
    """Decide the state of a trial: proof of completion first, then the launcher's word, then the records."""
    if seen.done:
        return Standing(State.COMPLETED, "results/done.json carries its fingerprint")
    if seen.job is not None and seen.live:
        return _of_live(seen.job)
    if seen.job is not None and seen.is_unknown:
        return _of_unknown(seen, seen.job)
    if seen.cancelled:
        return Standing(State.CANCELLED, "a person cancelled it; `orchestrate resume` takes it up again")
    if seen.trained and (seen.evaluates or _trainer(seen)):
        return _assess_trained(seen)
    return _assess_ended(seen)


def _of_live(job: JobState) -> Standing:
    said = f"attempt {job.attempt}: {job.evidence}"
    if job.hold:
        state = State.HELD if job.given_up else State.QUEUED
        return Standing(state, f"{said}; it is held in Slurm until somebody types `{job.hold}`")
    return Standing(State.QUEUED if job.phase is Phase.QUEUED else State.RUNNING, said)


def _of_unknown(seen: Observed, job: JobState) -> Standing:
    """Keep the state that the records give, and start nothing: the question failed, which says nothing."""
    if seen.open_attempt is not None:
        return Standing(State.RUNNING, f"attempt {job.attempt}: {job.evidence}; not touched until that is known")
    before = assess(replace(seen, job=None))
    return replace(
        before, reason=f"{before.reason}; {job.evidence}; not touched until that is known", next_attempt=None
    )


def _trainer(seen: Observed) -> int:
    """Return the number of the attempt whose job only had to train, and did; 0 if there is none."""
    if not seen.trained:
        return 0
    return next((attempt.number for attempt in seen.attempts if attempt.exit_code == Exit.DONE), 0)


def _assess_trained(seen: Observed) -> Standing:
    """Decide the state of a trial whose training is over; how far its evaluation is decides the rest."""
    elsewhere = seen.evaluation is not None and seen.evaluation.num_places > 0
    place = assess_evaluation(seen) if seen.evaluates or elsewhere else _assess_scoring(seen)
    reason = f"trained; its evaluation: {place.reason}"
    if place.state in (State.FAILED, State.DIVERGED):
        return Standing(State.FAILED, reason, place.cause)
    if place.state is State.HELD:
        return Standing(State.HELD, reason, place.cause)
    following = place.next_attempt and _following(seen)
    return Standing(State.TRAINED, reason, place.cause, following, place.not_before)


def _assess_scoring(seen: Observed) -> Standing:
    """Decide about jobs of the training that are left to evaluate; the one that trained has done what it should."""
    after = replace(seen, forgiven=max(seen.forgiven, _trainer(seen)))
    place = _assess_ended(after, of=f"{', '.join(seen.to_evaluate) or 'final'} to evaluate")
    return replace(place, not_before=0.0) if place.cause is None else place


def assess_evaluation(seen: Observed) -> Standing:
    """Decide where the jobs stand that only evaluate a trial, with the next attempt where one is due."""
    view = seen.evaluation or Observed()
    if view.job is not None and view.live:
        return _of_live(view.job)
    if view.job is not None and view.is_unknown:
        return replace(_of_unknown(replace(view, done=False), view.job), next_attempt=None)
    if seen.cancelled:
        return Standing(State.CANCELLED, "a person cancelled the trial")
    if not seen.to_evaluate:
        return Standing(State.COMPLETED, "nothing to evaluate now")
    place = _assess_ended(_since_success(seen, view), of=f"{', '.join(seen.to_evaluate)} to evaluate")
    # Nothing more will come to be evaluated with it, so there is nothing to wait for.
    return replace(place, not_before=0.0) if seen.trained and place.cause is None else place


def _since_success(seen: Observed, view: Observed) -> Observed:
    """Leave out the evaluations up to the last that ended well, unless it should have left nothing to do."""
    whole = [attempt for attempt in view.attempts if attempt.exit_code == Exit.DONE]
    if not whole:
        return view
    last = whole[-1]
    trained_at = max((attempt.ended for attempt in seen.attempts), default=0.0)
    if seen.trained and last.started > trained_at:
        return view
    return replace(view, forgiven=max(view.forgiven, last.number))


def _following(seen: Observed) -> int:
    numbers = [attempt.number for attempt in seen.attempts]
    return 1 + max([*numbers, seen.job.attempt if seen.job else 0, seen.forgiven])


def _assess_ended(seen: Observed, *, of: str = "") -> Standing:
    judgement = judge(seen.attempts, seen.checkpoint_step, forgiven=seen.forgiven)
    if judgement is None:
        return _assess_fresh(seen, of)
    following = _following(seen) if judgement.outcome is Outcome.RETRY else None
    state = _STATES[judgement.outcome]
    return Standing(state, judgement.reason, judgement.cause, following, judgement.not_before)


def _assess_fresh(seen: Observed, of: str) -> Standing:
    """Decide the state of a trial none of whose attempts counts."""
    has_attempts = bool(seen.attempts)
    reason = of or ("resumed by a person" if has_attempts else "never started")
    pause = _PAUSE_BETWEEN_EVALUATIONS_SECONDS if of and has_attempts else 0.0
    not_before = seen.attempts[-1].ended + pause if has_attempts else 0.0
    state = State.INTERRUPTED if has_attempts else State.PENDING
    return Standing(state, reason, None, _following(seen), not_before)


def jobs_to_stop(seen: Observed, now: float) -> tuple[tuple[JobState, str], ...]:
    """Name the live jobs of a trial that have to end, and why."""
    why = _why_stop_all(seen, now)
    views = [view for view in (seen, seen.evaluation) if view is not None and view.live]
    reasons = [(view.job, why or _why_stop_continuing(view)) for view in views]
    return tuple((job, reason) for job, reason in reasons if job is not None and reason)


def _why_stop_all(seen: Observed, now: float) -> str:
    if seen.done:
        late = now - seen.finished > _LONGEST_ENDING_SECONDS
        return "its results are there, but its processes do not end" if late else ""
    return "cancelled by a person" if seen.cancelled else ""


def _why_stop_continuing(view: Observed) -> str:
    """Say why a job must end that nobody but its predecessor, or the scheduler, has started; empty if it may go on."""
    live = view.live_attempt
    if live is not None and advanced(view.attempts, view.checkpoint_step)[-1]:
        return ""
    judgement = judge(view.ended_attempts, view.checkpoint_step, forgiven=view.forgiven)
    if judgement is None or judgement.outcome is not Outcome.FAILED or not judgement.cause.by_machine:
        return ""
    return f"its jobs go on by themselves, but {judgement.reason}"
