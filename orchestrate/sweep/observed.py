"""What was seen of a trial, and what follows from it without judging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.ledger import Ledger, add_up, of_evaluation, of_training


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
        trained: the training is over, whatever is left to evaluate.
        evaluates: evaluation is a job of its own where the trial runs now; else the jobs that train do it.
        to_evaluate: what has no scores yet: milestone checkpoints, and the final weights last.
        evaluation: the jobs that only evaluate, seen like a trial whose `checkpoint_step` counts its scores; None
            if there never was one.
    """

    done: bool = False
    cancelled: bool = False
    job: JobState | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    checkpoint_step: int = 0
    finished: float = 0.0
    forgiven: int = 0
    trained: bool = False
    evaluates: bool = False
    to_evaluate: tuple[str, ...] = ()
    evaluation: Observed | None = None

    @property
    def live(self) -> bool:
        """Whether the launcher says that processes that train exist or will exist."""
        return self.job is not None and self.job.live

    @property
    def is_running(self) -> bool:
        """Whether the launcher says that processes that train exist."""
        return self.job is not None and self.job.phase is Phase.RUNNING

    @property
    def is_unknown(self) -> bool:
        """Whether the launcher could not be asked, so that nothing may be concluded.

        A person who resumed the trial has given up a job that nobody can ask about; the launcher then names that job.
        """
        job = self.job
        return job is not None and job.phase is Phase.UNKNOWN and not (job.job and job.attempt <= self.forgiven)

    @property
    def open_attempt(self) -> AttemptRecord | None:
        """The last attempt, if nothing says that it has ended."""
        last = self.attempts[-1] if self.attempts else None
        return None if last is None or last.exit_code is not None or last.verdict is not None else last

    @property
    def may_live(self) -> bool:
        """Whether the launcher names a job that it cannot be asked about, and no record says that it has ended."""
        job, last = self.job, self.attempts[-1].number if self.attempts else 0
        named = self.is_unknown and job is not None and bool(job.job)
        return named and job is not None and (job.attempt > last or self.open_attempt is not None)

    @property
    def holds_place(self) -> bool:
        """Whether a job of the trial lives, or may live."""
        return self.live or self.may_live

    @property
    def live_attempt(self) -> AttemptRecord | None:
        """The attempt that runs now."""
        last = self.open_attempt
        return last if last and self.is_running and self.job and self.job.attempt == last.number else None

    @property
    def ended_attempts(self) -> tuple[AttemptRecord, ...]:
        """All attempts but the one that runs now."""
        return self.attempts[:-1] if self.live_attempt else self.attempts

    @property
    def live_jobs(self) -> tuple[JobState, ...]:
        """The live jobs of every stage."""
        views = (self, self.evaluation)
        return tuple(view.job for view in views if view is not None and view.job is not None and view.live)

    @property
    def is_settled(self) -> bool:
        """Whether no job of any stage lives, and the launcher had an answer to that."""
        views = [view for view in (self, self.evaluation) if view is not None]
        return not self.live_jobs and not any(view.is_unknown for view in views)

    @property
    def num_places(self) -> int:
        """Count the jobs of every stage that live, or may live."""
        return self.holds_place + (self.evaluation is not None and self.evaluation.holds_place)

    def until(self, now: float) -> Observed:
        """Return the same trial with an attempt that runs counted until now."""
        live, evaluation = self.live_attempt, self.evaluation
        attempts = self.attempts
        if live is not None:
            attempts = (*attempts[:-1], replace(live, ended=max(live.ended, now)))
        return replace(self, attempts=attempts, evaluation=evaluation.until(now) if evaluation else None)


def ledger_of(seen: Observed) -> Ledger:
    """Account for the hours of a trial over all attempts of all stages."""
    safe = seen.done or seen.trained or seen.live_attempt is not None
    training = of_training(seen.attempts, seen.checkpoint_step, safe=safe)
    return add_up((training, of_evaluation(seen.evaluation.attempts if seen.evaluation else ())))


def rank_hours(observed: Mapping[str, Observed], now: float = 0.0) -> float:
    """Add up the hours of all ranks of all attempts, wasted ones too; those that run count until `now`."""
    views = [view.until(now) for view in observed.values()]
    stages = [stage for view in views for stage in (view, view.evaluation) if stage]
    return sum(attempt.rank_seconds for stage in stages for attempt in stage.attempts) / 3600
