"""Decide what a sweep needs next. Pure: what is wanted and what was seen in, actions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrate.sweep.hours import UNLIMITED, Hours, Worker, allowances
from orchestrate.sweep.observed import Observed, rank_hours
from orchestrate.sweep.record import counted
from orchestrate.sweep.standing import Standing, State, assess, assess_evaluation, jobs_to_stop
from orchestrate.sweep.suspects import suspects

_NOTHING = Observed()


@dataclass(frozen=True)
class Desired:
    """What a sweep wants.

    Attributes:
        trials: ids, those to start first first.
        parallel: most live jobs of the sweep.
        gpu_hours: most rank-hours over all attempts; 0 is no limit.
        beside: ids of trials whose hours count, and whose jobs end at the limit, but of which nothing is started.
        max_jobs: most live jobs on the cluster; 0: as many as those of the sweep.
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
    beside: tuple[str, ...] = ()
    max_jobs: int = 0
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

    def stage_ranks(self, stage: str) -> int:
        """Return the ranks of a job of a stage."""
        return self.evaluate_ranks or self.ranks if stage == "evaluate" else self.ranks


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
    seen = _seen(desired, observed)
    if hours_of(desired, observed, now).is_spent:
        beside = {trial: observed.get(trial, _NOTHING) for trial in desired.beside}
        reason = f"limits.gpu_hours: {desired.gpu_hours:g} allowed, and as good as spent"
        return tuple(_stops({**seen, **beside}, now, reason))
    stops = _stops(seen, now)
    stopped = {stop.job for stop in stops}
    releases = [
        Release(trial, job.job, job.evidence)
        for trial, view in seen.items()
        for job in view.live_jobs
        if job.held and job.job not in stopped
    ]
    return (*stops, *releases, *_submits(desired, seen, now, hours_of(desired, observed, now)))


def _seen(desired: Desired, observed: Mapping[str, Observed]) -> dict[str, Observed]:
    return {trial: observed.get(trial, _NOTHING) for trial in desired.trials}


def _stops(seen: Mapping[str, Observed], now: float, reason: str = "") -> list[Cancel]:
    """List the live jobs that have to end, all of them if there is a reason for it."""
    found = []
    for trial, view in seen.items():
        whys = {job.job: why for job, why in jobs_to_stop(view, now)}
        jobs = [(job.job, whys.get(job.job, reason)) for job in view.live_jobs]
        found += [Cancel(trial, job, why) for job, why in jobs if why]
    return found


def hours_of(desired: Desired, observed: Mapping[str, Observed], now: float) -> Hours:
    """Add up the hours that count: those of all trials that the sweep has or had, whichever it acts on."""
    if not desired.gpu_hours:
        return UNLIMITED
    seen = {trial: observed.get(trial, _NOTHING) for trial in (*desired.trials, *desired.beside)}
    return Hours(
        desired.gpu_hours,
        rank_hours(seen, now),
        running=_ranks(desired, seen, running=True),
        live=_ranks(desired, seen),
        next_look_seconds=desired.next_look_seconds,
    )


def divide_hours(
    desired: Desired, observed: Mapping[str, Observed], submits: Sequence[Submit], now: float
) -> Mapping[tuple[str, str], float]:
    """Say how many rank-seconds each job may have spent that lives or is about to; see `allowances`."""
    return allowances(hours_of(desired, observed, now), _workers(desired, observed, submits, now))


def _workers(
    desired: Desired, observed: Mapping[str, Observed], submits: Sequence[Submit], now: float
) -> Iterator[Worker]:
    """Yield the jobs that live and those that are about to, each once."""
    about_to = {(submit.trial_id, submit.stage) for submit in submits}
    for trial in (*desired.trials, *desired.beside):
        whole = observed.get(trial, _NOTHING)
        for stage, view in (("pretrain", whole), ("evaluate", whole.evaluation or _NOTHING)):
            if view.holds_place or (trial, stage) in about_to:
                spent = sum(attempt.rank_seconds for attempt in view.until(now).attempts)
                yield Worker(trial, stage, desired.stage_ranks(stage), spent)


def _ranks(desired: Desired, seen: Mapping[str, Observed], *, running: bool = False) -> int:
    """Count the ranks of jobs that live, or only of those that run."""
    training = sum(view.is_running if running else view.holds_place for view in seen.values())
    views = [view.evaluation for view in seen.values() if view.evaluation]
    evaluating = sum(view.is_running if running else view.holds_place for view in views)
    return training * desired.ranks + evaluating * desired.stage_ranks("evaluate")


def _submits(desired: Desired, seen: Mapping[str, Observed], now: float, hours: Hours) -> list[Submit]:
    due = _due(desired, seen, now)
    if not due:
        return []
    begun = [view for view in (*seen.values(), *(v.evaluation for v in seen.values())) if view and view.attempts]
    exclude = suspects([view.ended_attempts for view in begun], now)
    free_jobs, free_ranks = _free_jobs(desired, seen), min(_free_ranks(desired, seen), hours.affordable_ranks)
    chosen: list[Submit] = []
    for trial, place, stage in due:
        ranks = desired.stage_ranks(stage)
        if len(chosen) >= free_jobs:
            break
        if ranks <= free_ranks:
            chosen.append(Submit(trial, place.next_attempt or 1, place.reason, stage, exclude))
            free_ranks -= ranks
    return chosen


def _free_jobs(desired: Desired, seen: Mapping[str, Observed]) -> int:
    """Count the jobs for which there is room: in the sweep, on the cluster, and as far as the place took any."""
    own = sum(view.num_places for view in seen.values())
    on_cluster = (desired.max_jobs or desired.parallel) - own - desired.elsewhere
    free = min(desired.parallel - own, on_cluster)
    return free if desired.room is None else min(free, desired.room - own - desired.elsewhere)


def _free_ranks(desired: Desired, seen: Mapping[str, Observed]) -> float:
    return desired.max_ranks - desired.elsewhere_ranks - _ranks(desired, seen) if desired.max_ranks else float("inf")


def _due(desired: Desired, seen: Mapping[str, Observed], now: float) -> list[tuple[str, Standing, str]]:
    """List what may be started now, first things first.

    What has begun is finished first, as its checkpoints are compute already spent; results come before more training.
    """
    found = []
    for trial in desired.trials:
        view, place = seen[trial], assess(seen[trial])
        if view.done or view.is_unknown:
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
    seen = _seen(desired, observed)
    if any(view.num_places or view.is_unknown for view in seen.values()):
        return ""
    still_open = [trial for trial, view in seen.items() if not assess(view).state.final]
    if not still_open:
        return ""
    ranks = [desired.stage_ranks(stage) for _, _, stage in _due(desired, seen, float("inf"))]
    if not ranks:
        first = still_open[0]
        said = assess(seen[first]).reason
        return f"{counted(len(still_open), 'trial')} open, and none can be started; {first[:8]}: {said}"
    least = min(ranks)
    if desired.max_ranks and desired.max_ranks < least:
        return f"limits.ranks: {desired.max_ranks} allowed, a job has {least}; raise it in the cluster config"
    if why := hours_of(desired, observed, now).why_too_few(least):
        number = counted(len(still_open), "trial")
        return f"{why}, {number} open; raise the limit in the sweep file and run the same command"
    return ""


def why_waiting(desired: Desired, observed: Mapping[str, Observed], now: float) -> str:
    """Say which jobs of others nothing starts for, although it is due and nothing of the sweep lives; else empty."""
    seen = _seen(desired, observed)
    ranks = [desired.stage_ranks(stage) for _, _, stage in _due(desired, seen, now)]
    if not ranks or any(view.num_places for view in seen.values()):
        return ""
    if desired.elsewhere and _free_jobs(desired, seen) <= 0:
        others = counted(desired.elsewhere, "job")
        return f"waiting: {others} of other sweeps or removed trials take up what limits.parallel allows"
    if desired.elsewhere_ranks and _free_ranks(desired, seen) < min(ranks):
        return f"waiting: jobs of other sweeps or removed trials have {desired.elsewhere_ranks} ranks; see limits.ranks"
    return ""
