"""What bounds the actions of a plan: jobs, ranks, what the place takes, and hours."""

from dataclasses import replace

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase, Verdict
from orchestrate.sweep.causes import Cause
from orchestrate.sweep.controller import Pass
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import Cancel, Desired, Release, Submit, divide_hours, plan, why_stalled, why_waiting
from orchestrate.sweep.standing import State, assess

HOUR = 3600.0
NOW = 10 * HOUR


def running(*, since: float, ranks: int = 2, phase: Phase = Phase.RUNNING) -> Observed:
    attempts = (AttemptRecord(1, since, since, ranks, None),) if phase is Phase.RUNNING else ()
    return Observed(job=JobState(phase, "7", 1, "squeue"), attempts=attempts)


def ended(code: int | None, said: str = "", *, asked: bool = False) -> Observed:
    verdict = Verdict(said, "squeue") if said else None
    attempt = AttemptRecord(1, 0.0, HOUR, 2, code, verdict=verdict, asked_to_end=asked)
    return Observed(job=JobState(Phase.FINISHED, "7", 1, ""), attempts=(attempt,))


def submitted(desired: Desired, seen: dict[str, Observed] | None = None) -> list[str]:
    return [action.trial_id for action in plan(desired, seen or {}, NOW) if isinstance(action, Submit)]


def test_ranks_are_bounded_over_all_sweeps() -> None:
    desired = Desired(("a", "b", "c"), parallel=9, ranks=8, max_ranks=24)
    assert submitted(desired) == ["a", "b", "c"]
    assert submitted(replace(desired, elsewhere=1, elsewhere_ranks=8)) == ["a", "b"]
    assert submitted(desired, {"a": running(since=NOW)}) == ["b", "c"]
    assert submitted(replace(desired, max_ranks=7)) == []
    assert "limits.ranks: 7 allowed" in why_stalled(replace(desired, max_ranks=7), {}, NOW)


def test_place_that_took_no_more_is_not_asked_for_more() -> None:
    desired = Desired(("a", "b", "c"), parallel=9, room=1)
    assert submitted(desired) == ["a"]
    assert submitted(desired, {"a": running(since=NOW)}) == []
    assert not why_stalled(desired, {"a": running(since=NOW)}, NOW)


def test_live_jobs_are_stopped_before_the_hours_are_overspent() -> None:
    seen = {"a": running(since=NOW - HOUR), "b": running(since=NOW, phase=Phase.QUEUED)}
    desired = Desired(("a", "b", "c"), parallel=2, ranks=2, gpu_hours=2.02, next_look_seconds=30.0)
    stops = plan(desired, seen, NOW + 10)  # 2.006 spent, 2.022 at the next look
    assert [(type(action), action.trial_id) for action in stops] == [(Cancel, "a"), (Cancel, "b")]
    assert plan(desired, seen, NOW - 60) == ()
    after = {"a": replace(ended(75), cancelled=False), "b": ended(None, "CANCELLED", asked=True)}
    assert assess(after["b"]).state is State.INTERRUPTED  # ours, so it may go on with more hours
    assert plan(desired, after, NOW) == ()
    assert "limits.gpu_hours" in why_stalled(desired, after, NOW)
    assert submitted(replace(desired, gpu_hours=99.0), after) == ["a", "b"]


def test_nothing_starts_that_could_hardly_begin_before_the_hours_are_spent() -> None:
    spent = {"a": replace(ended(0), done=True)}  # 2 hours
    desired = Desired(("a", "b"), parallel=2, ranks=2, gpu_hours=2.1, next_look_seconds=30.0)
    assert submitted(desired, spent) == []  # 0.1 hours are 3 minutes of 2 ranks
    assert why_stalled(desired, spent, NOW)
    assert submitted(replace(desired, gpu_hours=2.2), spent) == ["b"]


def test_job_that_waits_for_a_begin_time_is_released() -> None:
    held = Observed(job=JobState(Phase.QUEUED, "7", 2, "BeginTime", held=True), attempts=ended(75).attempts)
    assert plan(Desired(("a",), parallel=1), {"a": held}, NOW) == (Release("a", "7", "BeginTime"),)
    cancelled = replace(held, cancelled=True)
    assert [type(action) for action in plan(Desired(("a",), parallel=1), {"a": cancelled}, NOW)] == [Cancel]


def test_suspected_nodes_are_excluded_from_what_starts() -> None:
    attempt = AttemptRecord(1, 0.0, NOW - 60, 2, 87, blamed=("m3",))
    seen = {"a": Observed(attempts=(attempt,), job=JobState(Phase.FINISHED, "7", 1, ""))}
    assert all(a.exclude == ("m3",) for a in plan(Desired(("a", "b"), parallel=2), seen, NOW) if isinstance(a, Submit))


def test_job_cancelled_by_somebody_else_holds_the_trial() -> None:
    held = ended(75, "CANCELLED")
    assert (assess(held).state, assess(held).cause) == (State.HELD, Cause.CANCELLED)
    assert submitted(Desired(("a",), parallel=1), {"a": held}) == []
    resumed = replace(held, forgiven=1)
    assert submitted(Desired(("a",), parallel=1), {"a": resumed}) == ["a"]


def test_job_that_goes_on_by_itself_without_progress_is_stopped() -> None:
    attempts = tuple(AttemptRecord(n, 0.0, 60.0, 2, 75, following="job 8 goes on") for n in (1, 2, 3))
    queued = Observed(job=JobState(Phase.QUEUED, "8", 4, "squeue"), attempts=attempts)
    actions = plan(Desired(("a",), parallel=1), {"a": queued}, NOW)
    assert [type(action) for action in actions] == [Cancel]
    live = (*attempts, AttemptRecord(4, 60.0, 60.0, 2, None))
    working = replace(queued, job=JobState(Phase.RUNNING, "8", 4, "squeue"), attempts=live)
    assert [type(action) for action in plan(Desired(("a",), parallel=1), {"a": working}, NOW)] == [Cancel]
    saved = replace(working, checkpoint_step=5)
    assert plan(Desired(("a",), parallel=1), {"a": saved}, NOW) == ()


def test_failed_question_leads_to_no_action_whatever_was_seen_before() -> None:
    silent = JobState(Phase.UNKNOWN, "", 0, "squeue: no answer")
    for before in (Observed(), ended(75), ended(None), ended(87), replace(ended(75), forgiven=1)):
        seen = replace(before, job=silent)
        assert plan(Desired(("a",), parallel=9), {"a": seen}, NOW) == ()
        assert not why_stalled(Desired(("a",), parallel=9), {"a": seen}, NOW)
        assert assess(seen).next_attempt is None
    assert assess(Observed(job=silent)).state is State.PENDING


def test_hours_of_trials_beside_count_and_their_jobs_end_at_the_limit() -> None:
    removed = {"gone": running(since=NOW - HOUR), "before": replace(ended(0), done=True)}  # 2 + 2 hours
    desired = Desired(("a",), parallel=1, ranks=2, gpu_hours=5.0, next_look_seconds=30.0)
    assert submitted(desired, removed) == ["a"]  # nobody says that they count
    limited = replace(desired, gpu_hours=3.9, beside=("gone", "before"))
    assert [(type(action), action.trial_id) for action in plan(limited, removed, NOW)] == [(Cancel, "gone")]
    assert "4.00 spent" in why_stalled(limited, removed, NOW)
    assert submitted(replace(limited, gpu_hours=5.0), removed) == ["a"]


def test_small_sweep_does_not_starve_beside_a_large_one() -> None:
    small = Desired(("a", "b", "c"), parallel=2, max_jobs=100, elsewhere=50)
    assert submitted(small) == ["a", "b"]
    assert submitted(replace(small, elsewhere=99)) == ["a"]
    assert submitted(small, {"a": running(since=NOW)}) == ["b"]
    assert submitted(replace(small, room=51)) == ["a"]


def test_stall_is_told_by_the_stages_that_are_due() -> None:
    desired = Desired(("a",), parallel=1, ranks=8, evaluate_ranks=1, max_ranks=4)
    assert submitted(desired) == []
    assert "limits.ranks: 4 allowed, a job has 8" in why_stalled(desired, {}, NOW)
    scarce = replace(desired, max_ranks=0, gpu_hours=0.5, next_look_seconds=30.0)  # enough for 1 rank, not for 8
    assert submitted(scarce) == []
    assert "limits.gpu_hours" in why_stalled(scarce, {}, NOW)


def test_waiting_for_jobs_of_others_is_told() -> None:
    full = Desired(("a",), parallel=1, elsewhere=1)
    assert submitted(full) == []
    assert not why_stalled(full, {}, NOW)
    assert "1 job of other sweeps" in why_waiting(full, {}, NOW)
    ranks = Desired(("a",), parallel=9, ranks=4, max_ranks=8, elsewhere=1, elsewhere_ranks=6)
    assert "6 ranks" in why_waiting(ranks, {}, NOW)
    assert not why_waiting(replace(ranks, elsewhere_ranks=4), {}, NOW)
    assert not why_waiting(full, {"a": running(since=NOW)}, NOW)


def test_what_is_left_is_divided_among_live_jobs_by_their_ranks() -> None:
    seen = {"a": running(since=NOW - HOUR, ranks=4), "b": replace(ended(0), done=True), "old": running(since=NOW)}
    desired = Desired(("a", "b", "c"), parallel=3, ranks=4, evaluate_ranks=2, gpu_hours=20.0, beside=("old",))
    submits = [Submit("c", 1, ""), Submit("b", 1, "", "evaluate")]
    shares = divide_hours(desired, seen, submits, NOW)  # 4 + 2 hours are spent, 14 are left for 4 + 4 + 4 + 2 ranks
    hours = {key: seconds / HOUR for key, seconds in shares.items()}
    assert hours == {("a", "pretrain"): 8.0, ("old", "pretrain"): 4.0, ("c", "pretrain"): 4.0, ("b", "evaluate"): 2.0}
    later = divide_hours(desired, seen, submits, NOW + HOUR)
    assert sum(later.values()) <= 20.0 * HOUR
    assert set(divide_hours(replace(desired, gpu_hours=0.0), seen, submits, NOW).values()) == {float("inf")}


def test_job_that_no_node_launches_holds_its_trial_and_ends_the_sweep() -> None:
    job = JobState(Phase.QUEUED, "7", 1, "launch failed requeued held", hold="scontrol release 7", given_up=True)
    held = Observed(job=job)
    assert assess(held).state is State.HELD
    assert "scontrol release 7" in assess(held).reason
    assert plan(Desired(("a",), parallel=1), {"a": held}, NOW) == ()
    assert Pass({"a": held}, {"a": assess(held)}, 0, "").finished
    by_user = Observed(job=replace(job, given_up=False))
    assert assess(by_user).state is State.QUEUED
    assert "held in Slurm" in assess(by_user).reason
    assert not Pass({"a": by_user}, {"a": assess(by_user)}, 0, "").finished
