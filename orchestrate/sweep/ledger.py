"""Where the hours of ranks went: of each attempt, of a trial over all its attempts, of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from orchestrate.exits import Exit
from orchestrate.launchers.attempts import AttemptRecord


@dataclass(frozen=True)
class Ledger:
    """Hours of all ranks together, by what they bought; the parts add up to the total.

    Attributes:
        useful: steps that the trial kept, and the evaluation of what they led to.
        startup: from the start of a process to its first step.
        replayed: steps that were lost with the attempt, and had to be made again.
        other: all else: saving, stopping, hanging, lost without a trace.
        queue: hours that jobs waited in a queue, which cost nothing but patience; no part of the total.
    """

    useful: float = 0.0
    startup: float = 0.0
    replayed: float = 0.0
    other: float = 0.0
    queue: float = 0.0

    @property
    def total(self) -> float:
        """Everything that was spent."""
        return self.useful + self.startup + self.replayed + self.other

    @property
    def wasted(self) -> float:
        """What was spent and bought nothing."""
        return self.total - self.useful

    def rounded(self) -> Ledger:
        """Return the same to a few milliseconds."""
        return Ledger(**{field.name: round(getattr(self, field.name), 6) for field in fields(Ledger)})

    def __add__(self, other: Ledger) -> Ledger:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Ledger)}
        return Ledger(**sums)


def add_up(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum ledgers."""
    return sum(ledgers, Ledger())


def of_training(attempts: Sequence[AttemptRecord], checkpoint_step: int, *, safe: bool) -> Ledger:
    """Account for the attempts at training a trial.

    Args:
        attempts: all of them, in order; one that lives counts until its `ended`.
        checkpoint_step: of the newest checkpoint.
        safe: whether the last attempt goes on or was the last of all, so that its steps need no checkpoint.
    """
    kept, parts, found = checkpoint_step, [], float("inf")
    for attempt in reversed(attempts):
        goes_on = safe and attempt is attempts[-1]
        parts.append(_of_attempt(attempt, max(kept, attempt.last_step or 0) if goes_on else kept))
        if attempt.has_begun:  # what it found is what those before had kept, and no later one had to make again
            found = min(found, _begun_from(attempt))
            kept = int(found)
    return add_up(parts)


def _begun_from(attempt: AttemptRecord) -> int:
    """Return the step from which an attempt went on: an older one than that of the newest checkpoint if it is damaged.

    The step of an attempt that made none says nothing, as its first heartbeat is older than its checkpoint.
    """
    if attempt.first_step is None or (attempt.last_step or 0) <= attempt.first_step:
        return attempt.checkpoint_before
    return min(attempt.checkpoint_before, attempt.first_step)


def of_evaluation(attempts: Iterable[AttemptRecord]) -> Ledger:
    """Account for the jobs that only evaluate: useful if they ended well."""
    return add_up(_of_attempt(attempt, 0) for attempt in attempts)


def _of_attempt(attempt: AttemptRecord, kept_step: int) -> Ledger:
    """Split the time of an attempt whose steps up to `kept_step` were kept."""
    begun, reached = attempt.first_step or 0, attempt.last_step or 0
    startup = min(attempt.startup_seconds or 0.0, attempt.seconds)
    after = attempt.seconds - startup
    made = max(0, reached - begun)
    stepping = min(after, after if attempt.train_seconds is None else attempt.train_seconds) if made else 0.0
    kept = min(max(kept_step - begun, 0), made) / made if made else 0.0
    useful, replayed = stepping * kept, stepping * (1.0 - kept)
    rest = after - stepping
    if attempt.exit_code == Exit.DONE:
        useful, rest = useful + rest, 0.0  # what follows the steps of a whole attempt is its evaluation
    hours = attempt.ranks / 3600
    return Ledger(useful * hours, startup * hours, replayed * hours, rest * hours, attempt.queue_seconds / 3600)
