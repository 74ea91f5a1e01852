"""Decide what a sweep needs next. Pure: what is wanted and what was seen in, actions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrate.sweep.observed import Observed, rank_hours
from orchestrate.sweep.standing import Standing, State, assess, assess_evaluation, jobs_to_stop
from orchestrate.sweep.suspects import suspects

# A job that is admitted shall get further than its start before the hours are spent.
_LOOKS_WORTH_STARTING = 10


@dataclass(frozen=True)
class Desired:
    """What a sweep wants.

    Attributes:
        trials: ids, those to start first first.
        parallel: most live jobs on the cluster.
        gpu_hours: most rank-hours over all attempts; 0 is no limit.
        elsewhere: live jobs on the cluster that belong to other sweeps.
        ranks, evaluate_ranks: of a job that trains, and of one that only evaluates; 0 where training jobs evaluate.
        max_ranks: most ranks of live jobs on the cluster; 0 is no limit.
        elsewhere_ranks: ranks of live jobs that belong to other sweeps.
        room: most live jobs that the place was found to take; None while it has refused none.
        next_look_seconds: time until the next pass.
    """

    trials: tuple[str, ...]
    parallel: int
    gpu_hours: float = 0.0
    elsewhere: int = 0
    ranks: int = 1
    evaluate_ranks: int = 0
    max_ranks: int = 0
    elsewhere_ranks: int = 0
    room: int | None = None
    next_look_seconds: float = 0.0

    @property
    def evaluates(self) -> bool:
        """Whether the evaluation of a trial is a job of its own."""
        return self.evaluate_ranks > 0


@dataclass(frozen=True)
class Submit:
    """Start an attempt, away from the nodes in `exclude`."""

    trial_id: str
    attempt: int
    reason: str
    stage: str = "pretrain"
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Ask a live job to save and stop, with no successor."""

    trial_id: str
    job: str
    reason: str


@dataclass(frozen=True)
class Release:
    """Let a job start that only waits for a begin time."""

    trial_id: str
    job: str
    reason: str


Action = Submit | Cancel | Release


def plan(desired: Desired, observed: Mapping[str, Observed], now: float) -> tuple[Action, ...]:
    """Decide what to do next.

    Args:
        desired: what is wanted.
        observed: what was seen of each trial; one that is missing was never touched.
        now: unix time.

    Returns:
        Actions in the order in which they should be done. The same input gives the same actions; once they are done
        and seen, none are left. What could not be asked leads to no action.
    """
    seen = {trial: observed.get(trial, Observed()) for trial in desired.trials}
    if _is_spent(desired, seen, now):
        return tuple(_stops(seen, now, f"limits.gpu_hours: {desired.gpu_hours:g} allowed, and as good as spent"))
    stops = _stops(seen, now)
    stopped = {stop.job for stop in stops}
    releases = [
        Release(trial, job.job, job.evidence)
        for trial, view in seen.items()
        for job in view.live_jobs
        if job.held and job.job not in stopped
    ]
    return (*stops, *releases, *_submits(desired, seen, now))


def _stops(seen: Mapping[str, Observed], now: float, reason: str = "") -> list[Cancel]:
    """List the live jobs that have to end, all of them if there is a reason for it."""
    found = []
    for trial, view in seen.items():
        whys = {job.job: why for job, why in jobs_to_stop(view, now)}
        jobs = [(job.job, whys.get(job.job, reason)) for job in view.live_jobs]
        found += [Cancel(trial, job, why) for job, why in jobs if why]
    return found


def _is_spent(desired: Desired, seen: Mapping[str, Observed], now: float) -> bool:
    """Tell whether the hours are spent, or will be before the next look unless the live jobs save and stop."""
    soon = _ranks(desired, seen, running=True) * desired.next_look_seconds / 3600
    return bool(desired.gpu_hours) and rank_hours(seen, now) + soon >= desired.gpu_hours


def _ranks(desired: Desired, seen: Mapping[str, Observed], *, running: bool = False) -> int:
    """Count the ranks of jobs that live, or only of those that run."""
    training = sum(view.is_running if running else view.holds_place for view in seen.values())
    views = [view.evaluation for view in seen.values() if view.evaluation]
    evaluating = sum(view.is_running if running else view.holds_place for view in views)
    return training * desired.ranks + evaluating * (desired.evaluate_ranks or desired.ranks)


def _submits(desired: Desired, seen: Mapping[str, Observed], now: float) -> list[Submit]:
    due = _due(desired, seen, now)
    if not due:
        return []
    begun = [view for view in (*seen.values(), *(v.evaluation for v in seen.values())) if view and view.attempts]
    exclude = suspects([view.ended_attempts for view in begun], now)
    live = sum(view.num_places for view in seen.values()) + desired.elsewhere
    free_jobs = min(desired.parallel, desired.parallel if desired.room is None else desired.room) - live
    live_ranks = _ranks(desired, seen)
    free_ranks = desired.max_ranks - desired.elsewhere_ranks - live_ranks if desired.max_ranks else float("inf")
    affordable = _affordable_ranks(desired, seen, now)
    chosen: list[Submit] = []
    for trial, place, stage in due:
        ranks = desired.evaluate_ranks if stage == "evaluate" else desired.ranks
        if len(chosen) >= free_jobs:
            break
        if ranks <= min(free_ranks, affordable):
            chosen.append(Submit(trial, place.next_attempt or 1, place.reason, stage, exclude))
            free_ranks, affordable = free_ranks - ranks, affordable - ranks
    return chosen


def _affordable_ranks(desired: Desired, seen: Mapping[str, Observed], now: float) -> float:
    """Return how many more ranks can run for some looks before the hours are spent."""
    if not desired.gpu_hours:
        return float("inf")
    hours_each = _LOOKS_WORTH_STARTING * desired.next_look_seconds / 3600
    left = desired.gpu_hours - rank_hours(seen, now)
    return left / hours_each - _ranks(desired, seen) if hours_each else float("inf")


def _due(desired: Desired, seen: Mapping[str, Observed], now: float) -> list[tuple[str, Standing, str]]:
    """List what may be started now, first things first.

    What has begun is finished first, as its checkpoints are compute already spent; results come before more training.
    """
    found = []
    for trial in desired.trials:
        view, place = seen[trial], assess(seen[trial])
        if view.is_unknown:
            continue
        if desired.evaluates and view.trained:
            candidates = [(0, assess_evaluation(view), "evaluate")]
        else:
            candidates = [(3 if place.state is State.PENDING else 1, place, "pretrain")]
            if desired.evaluates and not place.state.final:
                candidates.append((2, assess_evaluation(view), "evaluate"))
        found += [
            (order, trial, each, stage)
            for order, each, stage in candidates
            if each.next_attempt and each.not_before <= now
        ]
    found.sort(key=lambda entry: entry[0])
    return [(trial, place, stage) for _, trial, place, stage in found]


def why_stalled(desired: Desired, observed: Mapping[str, Observed], now: float) -> str:
    """Say why open trials will stay open; empty while something is live, or may be started later."""
    seen = {trial: observed.get(trial, Observed()) for trial in desired.trials}
    if any(view.num_places or view.is_unknown for view in seen.values()):
        return ""
    num_open = sum(not assess(view).state.final for view in seen.values())
    if not num_open:
        return ""
    least = min(ranks for ranks in (desired.ranks, desired.evaluate_ranks) if ranks)
    if desired.max_ranks and desired.max_ranks < least:
        return f"limits.ranks: {desired.max_ranks} allowed, a job has {least}; raise it in the cluster config"
    if not _is_spent(desired, seen, now) and _affordable_ranks(desired, seen, now) >= least:
        return ""
    return (
        f"limits.gpu_hours: {desired.gpu_hours:g} allowed, {rank_hours(seen, now):.2f} spent, "
        f"{num_open} trials are open; raise the limit in the sweep file and run the same command"
    )
