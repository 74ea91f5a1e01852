"""Judge a row of attempts that have ended: is another one due, and when, or is it over?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise, takewhile

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.sweep.causes import RETRIES, Cause, cause_of, describe_exit

# Attempts in a row that leave the checkpoint where it was, of causes that nothing else bounds.
ATTEMPTS_WITHOUT_PROGRESS = 3
_LONGEST_DELAY_SECONDS = 60.0
# A store or a mount may be away for half an hour, which shall not spend all retries.
_DELAYS_OF_A_PLACE_SECONDS = (1.0, 30.0, 120.0, 600.0, 1800.0)
# Trying again at once is right where the place that failed is left, or waits for room by itself.
_AT_ONCE = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.PREFLIGHT, Cause.CANCELLED})


class Outcome(StrEnum):
    """What a row of attempts comes to."""

    RETRY = "retry"
    FAILED = "failed"
    DIVERGED = "diverged"
    HELD = "held"


@dataclass(frozen=True)
class Judgement:
    """What is to be done after some attempts.

    Attributes:
        outcome, cause, reason: what, why in a word, why in a sentence.
        not_before: unix time until which a retry waits.
    """

    outcome: Outcome
    cause: Cause
    reason: str
    not_before: float = 0.0


def advanced(attempts: Sequence[AttemptRecord], checkpoint_step: int) -> tuple[bool, ...]:
    """Say of each attempt whether it moved the checkpoint further than it ever was.

    What did it find, and what did the next one find? A checkpoint that is damaged and made again is no progress.
    """
    found = [*(attempt.checkpoint_before for attempt in attempts), checkpoint_step]
    return tuple(after > before for before, after in pairwise(accumulate(found, max)))


def since_progress(attempts: Sequence[AttemptRecord], checkpoint_step: int) -> Sequence[AttemptRecord]:
    """Return the attempts since the checkpoint last moved, with the one that moved it; all if it never did."""
    moved = advanced(attempts, checkpoint_step)
    last = max((index for index, did in enumerate(moved) if did), default=0)
    return attempts[last:]


def judge(attempts: Sequence[AttemptRecord], checkpoint_step: int, *, forgiven: int = 0) -> Judgement | None:
    """Decide what follows from attempts that have ended without completing what they were for.

    Args:
        attempts: all of them, in order.
        checkpoint_step: of the newest checkpoint.
        forgiven: attempts up to this number no longer count.

    Returns:
        None if there is nothing to judge.
    """
    recent = [attempt for attempt in since_progress(attempts, checkpoint_step) if attempt.number > forgiven]
    if not recent:
        return None
    last, cause = recent[-1], cause_of(recent[-1])
    fate = f"attempt {last.number} ended: {cause} ({describe_exit(last)})"
    if cause is Cause.DIVERGED:
        return Judgement(Outcome.DIVERGED, cause, f"{fate}; the loss is not finite, which is a result")
    if cause is Cause.CANCELLED and not last.asked_to_end:
        return Judgement(Outcome.HELD, cause, f"{fate}; somebody cancelled its job, so a person must say how to go on")
    count = _count(cause, recent)
    why = _why_failed(recent, cause, count)
    if why:
        return Judgement(Outcome.FAILED, cause, f"{fate}, {why}")
    if _is_stuck(attempts, checkpoint_step, forgiven):
        stuck = f"{ATTEMPTS_WITHOUT_PROGRESS} attempts in a row ended at checkpoint step {checkpoint_step}"
        return Judgement(Outcome.FAILED, Cause.NO_PROGRESS, f"{fate}; {stuck}")
    return Judgement(Outcome.RETRY, cause, fate, last.ended + _delay(cause, count))


def _delay(cause: Cause, count: int) -> float:
    """Return the seconds before the retry after the given number of faults of the same cause."""
    if cause in _AT_ONCE:
        return 0.0
    if cause is Cause.INFRASTRUCTURE:
        return _DELAYS_OF_A_PLACE_SECONDS[min(count, len(_DELAYS_OF_A_PLACE_SECONDS)) - 1]
    return float(min(_LONGEST_DELAY_SECONDS, 2.0 ** (count - 1)))


def _count(cause: Cause, recent: Sequence[AttemptRecord]) -> int:
    if cause is Cause.PREFLIGHT:  # other nodes may be sound, so only an unbroken row of them counts
        return sum(1 for _ in takewhile(lambda attempt: cause_of(attempt) is cause, reversed(recent)))
    return sum(cause_of(attempt) is cause for attempt in recent)


def _why_failed(recent: Sequence[AttemptRecord], cause: Cause, count: int) -> str:
    last = recent[-1]
    if cause is Cause.USER_ERROR and last.traceback:
        same = [attempt for attempt in recent[:-1] if attempt.traceback == last.traceback]
        if same:
            return f"the same error as attempt {same[-1].number}, at the same place: {last.error or 'see its log'}"
    retries = RETRIES[cause]
    if count <= retries:
        return ""
    return "which is not retried" if retries == 0 else f"and its {retries:g} retries are spent"


def _is_stuck(attempts: Sequence[AttemptRecord], checkpoint_step: int, forgiven: int) -> bool:
    """Tell whether unlimited causes alone would go on for ever; limited ones are bounded by their retries."""
    moved = advanced(attempts, checkpoint_step)
    unmoved = [
        cause_of(attempt)
        for attempt, did in zip(attempts, moved, strict=True)
        if attempt.number > max(forgiven, _last_mover(attempts, moved)) and attempt.has_begun and not did
    ]
    return sum(cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) for cause in unmoved) >= ATTEMPTS_WITHOUT_PROGRESS


def _last_mover(attempts: Sequence[AttemptRecord], moved: Sequence[bool]) -> int:
    return max((attempt.number for attempt, did in zip(attempts, moved, strict=True) if did), default=0)
