"""What `limits.gpu_hours` still allows, and how the jobs that live divide it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# A job that is admitted shall get further than its start before the hours are spent.
_LOOKS_WORTH_STARTING = 10
# Passes of a timer are far apart; the job looks at its allowance itself, so it need not outlive ten of them.
_LONGEST_START_SECONDS = 600.0


@dataclass(frozen=True)
class Hours:
    """Hours of ranks that a sweep may spend, and what it has spent.

    Attributes:
        allowed: over all attempts of all trials that the sweep has or had; 0 is no limit.
        spent: until now, wasted ones too.
        running, live: ranks that run now, and those with others that are queued.
        next_look_seconds: time until somebody looks again.
    """

    allowed: float
    spent: float
    running: int = 0
    live: int = 0
    next_look_seconds: float = 0.0

    @property
    def is_spent(self) -> bool:
        """Whether they are spent, or will be before the next look unless the live jobs save and stop."""
        soon = self.running * self.next_look_seconds / 3600
        return bool(self.allowed) and self.spent + soon >= self.allowed

    @property
    def affordable_ranks(self) -> float:
        """How many more ranks can run for some time before they are spent."""
        look = self.next_look_seconds
        seconds_each = max(look, min(_LOOKS_WORTH_STARTING * look, _LONGEST_START_SECONDS))
        if not self.allowed or not seconds_each:
            return float("inf")
        return (self.allowed - self.spent) * 3600 / seconds_each - self.live

    def why_too_few(self, ranks: int) -> str:
        """Say why no further job of so many ranks is started; empty if one may be."""
        if not self.is_spent and self.affordable_ranks >= ranks:
            return ""
        return f"limits.gpu_hours: {self.allowed:g} allowed, {self.spent:.2f} spent"


UNLIMITED = Hours(0.0, 0.0)


@dataclass(frozen=True)
class Worker:
    """A job that lives or is about to: its ranks, and the rank-seconds that its trial has spent on its stage."""

    trial_id: str
    stage: str
    ranks: int
    spent_seconds: float


def allowances(hours: Hours, workers: Iterable[Worker]) -> Mapping[tuple[str, str], float]:
    """Divide what is left among the jobs, by their ranks.

    Returns:
        By trial and stage the rank-seconds that all its attempts together may have spent when the job ends. Jobs that
        keep to it never spend more than is allowed, though nobody looks. Infinity if there is no limit.
    """
    jobs = list(workers)
    left = (hours.allowed - hours.spent) * 3600 if hours.allowed else float("inf")
    each = max(0.0, left) / max(1, sum(job.ranks for job in jobs))
    return {(job.trial_id, job.stage): job.spent_seconds + each * job.ranks for job in jobs}
