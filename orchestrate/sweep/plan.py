"""Decide what a sweep needs next. Pure: what is wanted and what was seen in, actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from orchestrate.launchers.base import SIGNAL_BASE, AttemptRecord, JobState, Phase


class State(StrEnum):
    """Where a trial is. The last four are final until a person says otherwise."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    DIVERGED = "DIVERGED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """Whether a sweep has nothing left to do for the trial."""
        return self in (State.COMPLETED, State.FAILED, State.DIVERGED, State.CANCELLED)


class Cause(StrEnum):
    """Why an attempt ended before the trial was done."""

    PREEMPTED = "preempted"
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    PREFLIGHT = "preflight"
    DIVERGED = "diverged"
    USER_ERROR = "user error"
    NO_PROGRESS = "no progress"


# Retries each cause is worth. Preemption is nobody's fault; a wrong config fails the same way every time.
RETRIES: Mapping[Cause, float] = {
    Cause.PREEMPTED: float("inf"),
    Cause.INFRASTRUCTURE: 5,
    Cause.HANG: 3,
    Cause.PREFLIGHT: 3,
    Cause.USER_ERROR: 0,
}
# Attempts in a row that leave the checkpoint where it was.
ATTEMPTS_WITHOUT_PROGRESS = 3
_LONGEST_DELAY_SECONDS = 60.0
# A job ends a moment after its results are there; libraries can hang on their way out.
_LONGEST_ENDING_SECONDS = 120.0
_CAUSES = {74: Cause.INFRASTRUCTURE, 75: Cause.PREEMPTED, 86: Cause.HANG, 87: Cause.PREFLIGHT, 88: Cause.DIVERGED}


@dataclass(frozen=True)
class Observed:
    """What was seen of one trial.

    Attributes:
        done: results/done.json exists and carries the trial's fingerprint.
        cancelled: a person cancelled the trial.
        job: the launcher's answer, or None if no job was ever submitted.
        attempts: in order; with the current one if a job is live.
        checkpoint_step: optimizer step of the last whole checkpoint, 0 without one.
        finished: unix time at which it was done.
        forgiven: a person resumed the trial after this attempt, so those up to it no longer count.
    """

    done: bool = False
    cancelled: bool = False
    job: JobState | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    checkpoint_step: int = 0
    finished: float = 0.0
    forgiven: int = 0

    @property
    def live(self) -> bool:
        """Whether the launcher says that processes exist or will exist."""
        return self.job is not None and self.job.live


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


@dataclass(frozen=True)
class Desired:
    """What a sweep wants.

    Attributes:
        trials: ids, those to start first first.
        parallel: most live trials on the cluster.
        gpu_hours: most rank-hours over all attempts; 0 is no limit.
        elsewhere: live trials on the cluster that belong to other sweeps.
    """

    trials: tuple[str, ...]
    parallel: int
    gpu_hours: float = 0.0
    elsewhere: int = 0


@dataclass(frozen=True)
class Submit:
    """Start an attempt."""

    trial_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class Cancel:
    """Ask a live job to save and stop."""

    trial_id: str
    job: str
    reason: str


Action = Submit | Cancel


def cause_of(attempt: AttemptRecord) -> Cause:
    """Name the cause of an attempt that ended without completing its trial."""
    code = attempt.exit_code
    if code is None or code == 0 or code >= SIGNAL_BASE:
        return Cause.INFRASTRUCTURE  # lost; ended well without proof; killed by a signal
    return _CAUSES.get(code, Cause.USER_ERROR)


def advanced(attempts: Sequence[AttemptRecord], checkpoint_step: int) -> tuple[bool, ...]:
    """Say of each attempt whether it moved the checkpoint: what did it find, and what did the next one find?"""
    found = [*(attempt.checkpoint_before for attempt in attempts), checkpoint_step]
    return tuple(after > before for before, after in pairwise(found))


def assess(seen: Observed) -> Standing:
    """Decide the state of a trial: proof of completion first, then the launcher's word, then the records."""
    if seen.done:
        return Standing(State.COMPLETED, "results/done.json carries its fingerprint")
    job = seen.job
    if job is not None and seen.live:
        state = State.QUEUED if job.phase is Phase.QUEUED else State.RUNNING
        return Standing(state, f"attempt {job.attempt}: {job.evidence}")
    if job is not None and job.phase is Phase.UNKNOWN and job.attempt > seen.forgiven:
        return Standing(State.RUNNING, f"attempt {job.attempt}: {job.evidence}; not touched until that is known")
    if seen.cancelled:
        return Standing(State.CANCELLED, "a person cancelled it; `orchestrate resume` takes it up again")
    return _assess_ended(seen)


def _assess_ended(seen: Observed) -> Standing:
    numbers = [attempt.number for attempt in seen.attempts]
    following = 1 + max([*numbers, seen.job.attempt if seen.job else 0, seen.forgiven])
    counted = [attempt for attempt in seen.attempts if attempt.number > seen.forgiven]
    if not counted:
        state = State.INTERRUPTED if numbers else State.PENDING
        return Standing(state, "resumed by a person" if numbers else "never started", next_attempt=following)
    last, cause = counted[-1], cause_of(counted[-1])
    fate = f"attempt {last.number} ended: {cause} ({describe_exit(last)})"
    if cause is Cause.DIVERGED:
        return Standing(State.DIVERGED, f"{fate}; the loss is not finite, which is a result", cause)
    moved = advanced(seen.attempts, seen.checkpoint_step)[-len(counted) :]
    stuck = not any(moved[-ATTEMPTS_WITHOUT_PROGRESS:]) and len(moved) >= ATTEMPTS_WITHOUT_PROGRESS
    count = sum(cause_of(attempt) is cause for attempt in counted)
    if count > RETRIES[cause]:
        return Standing(State.FAILED, f"{fate}, {_retries_spent(cause)}", cause)
    if stuck:
        reason = (
            f"{fate}; {ATTEMPTS_WITHOUT_PROGRESS} attempts in a row ended at checkpoint step {seen.checkpoint_step}"
        )
        return Standing(State.FAILED, reason, Cause.NO_PROGRESS)
    delay = 0.0 if cause is Cause.PREEMPTED else min(_LONGEST_DELAY_SECONDS, 2.0 ** (count - 1))
    return Standing(State.INTERRUPTED, fate, cause, following, last.ended + delay)


def _retries_spent(cause: Cause) -> str:
    retries = RETRIES[cause]
    return "which is not retried" if retries == 0 else f"and its {retries:g} retries are spent"


def describe_exit(attempt: AttemptRecord) -> str:
    """Say how an attempt ended, in a few words."""
    code = attempt.exit_code
    if code is None:
        return "no exit code: lost or killed"
    if code == 0:
        return "exit 0 without results/done.json"
    rank = "" if attempt.failed_rank is None else f" of rank {attempt.failed_rank}"
    return f"exit code {code}{rank}" + (f", stopped by {attempt.stopped_by}" if attempt.stopped_by else "")


def rank_hours(observed: Mapping[str, Observed]) -> float:
    """Add up the hours of all ranks of all attempts, wasted ones too."""
    return sum(attempt.rank_seconds for seen in observed.values() for attempt in seen.attempts) / 3600


def _why_cancel(seen: Observed, now: float) -> str:
    if seen.done:
        late = now - seen.finished > _LONGEST_ENDING_SECONDS
        return "its results are there, but its processes do not end" if late else ""
    return "cancelled by a person" if seen.cancelled else ""


def plan(desired: Desired, observed: Mapping[str, Observed], now: float) -> tuple[Action, ...]:
    """Decide what to do next.

    Args:
        desired: what is wanted.
        observed: what was seen of each trial; one that is missing was never touched.
        now: unix time.

    Returns:
        Actions in the order in which they should be done. The same input gives the same actions; once they are done
        and seen, none are left.
    """
    seen = {trial: observed.get(trial, Observed()) for trial in desired.trials}
    standing = {trial: assess(view) for trial, view in seen.items()}
    cancels = [
        Cancel(trial, view.job.job, _why_cancel(view, now))
        for trial, view in seen.items()
        if view.job is not None and view.live and _why_cancel(view, now)
    ]
    if desired.gpu_hours and rank_hours(seen) >= desired.gpu_hours:
        return tuple(cancels)
    # A job that is done but has not ended yet still fills its place.
    live = sum(seen[trial].live or place.state is State.RUNNING for trial, place in standing.items())
    free = max(0, desired.parallel - desired.elsewhere - live)
    due = [trial for trial in desired.trials if standing[trial].next_attempt and standing[trial].not_before <= now]
    # What has begun is finished first: its checkpoints are compute already spent.
    due.sort(key=lambda trial: standing[trial].state is State.PENDING)
    submits = [Submit(trial, standing[trial].next_attempt or 1, standing[trial].reason) for trial in due[:free]]
    return (*cancels, *submits)
