from dataclasses import replace
from typing import Any

import pytest

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.causes import RETRIES, Cause, cause_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import Cancel, Desired, Submit, plan
from orchestrate.sweep.retries import ATTEMPTS_WITHOUT_PROGRESS, advanced
from orchestrate.sweep.standing import State, assess

NOW = 1e6


def ended(number: int, code: int | None, *, checkpoint_before: int = 0, hours: float = 0.0) -> AttemptRecord:
    return AttemptRecord(number, 0.0, hours * 3600, 2, code, checkpoint_before=checkpoint_before)


def advancing(*codes: int | None) -> Observed:
    """Attempts that each moved the checkpoint by 10 steps."""
    attempts = tuple(ended(n + 1, code, checkpoint_before=10 * n) for n, code in enumerate(codes))
    return Observed(attempts=attempts, checkpoint_step=10 * len(codes), job=job(Phase.FINISHED, len(codes)))


def standing_still(*codes: int | None) -> Observed:
    """Attempts after a first checkpoint that none of them moved."""
    return of(*(ended(n + 1, code, checkpoint_before=10) for n, code in enumerate(codes)), checkpoint_step=10)


def of(*attempts: AttemptRecord, checkpoint_step: int = 0) -> Observed:
    last = attempts[-1].number
    return Observed(attempts=attempts, checkpoint_step=checkpoint_step, job=job(Phase.FINISHED, last))


def job(phase: Phase, attempt: int = 1, **values: Any) -> JobState:
    return JobState(phase, f"oc-x.{attempt}", attempt, "because", **values)


def test_untouched_trial_is_submitted_as_attempt_one() -> None:
    actions = plan(Desired(("a",), parallel=1), {}, NOW)
    assert actions == (Submit("a", 1, "never started"),)


@pytest.mark.parametrize(
    ("code", "state", "cause"),
    [
        (74, State.INTERRUPTED, Cause.INFRASTRUCTURE),
        (75, State.INTERRUPTED, Cause.PREEMPTED),
        (None, State.INTERRUPTED, Cause.INFRASTRUCTURE),
        (0, State.INTERRUPTED, Cause.INFRASTRUCTURE),
        (137, State.INTERRUPTED, Cause.INFRASTRUCTURE),
        (86, State.INTERRUPTED, Cause.HANG),
        (87, State.INTERRUPTED, Cause.PREFLIGHT),
        (88, State.DIVERGED, Cause.DIVERGED),
        (76, State.INTERRUPTED, Cause.INFRASTRUCTURE),
        (1, State.INTERRUPTED, Cause.USER_ERROR),
        (127, State.INTERRUPTED, Cause.USER_ERROR),
        (2, State.FAILED, Cause.BAD_INPUT),
        (89, State.FAILED, Cause.OUT_OF_MEMORY),
    ],
)
def test_exit_code_decides_state_and_cause(code: int | None, state: State, cause: Cause) -> None:
    place = assess(advancing(code))
    assert (place.state, place.cause) == (state, cause)
    assert (place.next_attempt == 2) == (state is State.INTERRUPTED)


def test_proof_of_completion_outweighs_every_other_evidence() -> None:
    seen = replace(advancing(1), done=True, finished=NOW, cancelled=True, job=job(Phase.RUNNING))
    assert assess(seen).state is State.COMPLETED
    assert plan(Desired(("a",), parallel=9), {"a": seen}, NOW) == ()


def test_job_that_does_not_end_after_its_results_is_ended() -> None:
    seen = {"a": Observed(done=True, finished=NOW, job=job(Phase.RUNNING))}
    desired = Desired(("a", "b"), parallel=1)
    assert plan(desired, seen, NOW + 1) == ()  # it still fills the only place
    assert [type(action) for action in plan(desired, seen, NOW + 1000)] == [Cancel]


def test_live_job_outweighs_the_records() -> None:
    assert assess(replace(advancing(1), job=job(Phase.RUNNING, 2))).state is State.RUNNING
    assert assess(replace(advancing(1), job=job(Phase.QUEUED, 2))).state is State.QUEUED


def test_nothing_is_done_about_a_job_that_cannot_be_asked() -> None:
    seen = Observed(job=job(Phase.UNKNOWN), attempts=(ended(1, None),))
    assert plan(Desired(("a",), parallel=9), {"a": seen}, NOW) == ()
    assert assess(replace(seen, forgiven=1)).next_attempt == 2  # a person said that it is gone


@pytest.mark.parametrize("code", [None, 86, 87, 1])
def test_each_cause_has_its_own_number_of_retries(code: int | None) -> None:
    retries = int(RETRIES[cause_of(ended(1, code))])
    assert assess(standing_still(*[code] * retries)).state is State.INTERRUPTED
    assert assess(standing_still(*[code] * (retries + 1))).state is State.FAILED
    assert assess(standing_still(*[code] * retries, 75)).state is State.INTERRUPTED


@pytest.mark.parametrize("code", [None, 86, 1])
def test_progress_makes_faults_forgotten(code: int | None) -> None:
    assert assess(advancing(*[code] * 100)).state is State.INTERRUPTED


def test_preflight_counts_in_a_row_even_without_progress() -> None:
    others_between = [87] * 16 + [None] + [87] * 16
    assert assess(standing_still(*others_between)).state is State.INTERRUPTED
    assert assess(standing_still(*others_between, 87)).state is State.FAILED


def test_same_traceback_twice_fails_a_trial() -> None:
    first, other = (replace(ended(n, 1), traceback=text) for n, text in ((1, "ab"), (2, "cd")))
    same = replace(first, number=2, error="KeyError: 'x'")
    assert assess(of(first, other)).state is State.INTERRUPTED
    place = assess(of(first, same))
    assert (place.state, place.cause) == (State.FAILED, Cause.USER_ERROR)
    assert "KeyError: 'x'" in place.reason
    further = replace(same, checkpoint_before=10)  # it came further in between: not the same failure
    assert assess(of(first, further, checkpoint_step=20)).state is State.INTERRUPTED


def test_preemption_is_retried_as_long_as_checkpoints_advance() -> None:
    assert assess(advancing(*[75] * 100)).state is State.INTERRUPTED


def test_machine_faults_have_more_patience_than_attempts_without_progress() -> None:
    assert assess(standing_still(None, None, None, None)).state is State.INTERRUPTED


def test_attempts_without_progress_end_a_trial() -> None:
    stuck = tuple(ended(n + 1, 75) for n in range(ATTEMPTS_WITHOUT_PROGRESS))
    place = assess(Observed(attempts=stuck, job=job(Phase.FINISHED, len(stuck))))
    assert (place.state, place.cause) == (State.FAILED, Cause.NO_PROGRESS)
    assert assess(Observed(attempts=stuck, checkpoint_step=1)).state is State.INTERRUPTED
    assert assess(Observed(attempts=stuck[:-1])).state is State.INTERRUPTED


def test_progress_of_an_attempt_is_what_the_next_one_finds() -> None:
    attempts = [ended(1, 75, checkpoint_before=0), ended(2, 75, checkpoint_before=5), ended(3, 75, checkpoint_before=5)]
    assert advanced(attempts, 7) == (True, False, True)


def test_resumed_trial_starts_with_fresh_retries() -> None:
    failed = advancing(2)
    assert assess(failed).state is State.FAILED
    place = assess(replace(failed, forgiven=1))
    assert (place.state, place.next_attempt) == (State.INTERRUPTED, 2)


def test_cancelled_trial_is_stopped_and_not_started_again() -> None:
    running = Observed(cancelled=True, job=job(Phase.RUNNING, 3))
    desired = Desired(("a",), parallel=9)
    assert plan(desired, {"a": running}, NOW) == (Cancel("a", "oc-x.3", "cancelled by a person"),)
    stopped = replace(advancing(75), cancelled=True)
    assert assess(stopped).state is State.CANCELLED
    assert plan(desired, {"a": stopped}, NOW) == ()


def test_retries_outlast_half_an_hour_without_a_store() -> None:
    counts = range(1, int(RETRIES[Cause.INFRASTRUCTURE]) + 1)
    delays = [assess(standing_still(*[74] * count)).not_before for count in counts]
    assert delays[0] <= 2.0  # most faults are over at once
    assert delays == sorted(delays)
    assert sum(delays) > 1800.0


def test_no_more_trials_run_than_allowed() -> None:
    ids = tuple("abcdef")
    seen = {"c": Observed(job=job(Phase.RUNNING)), "d": Observed(job=job(Phase.UNKNOWN))}
    actions = plan(Desired(ids, parallel=5, elsewhere=1), seen, NOW)
    assert [action.trial_id for action in actions] == ["a", "b"]
    assert plan(Desired(ids, parallel=2), seen, NOW) == ()


def test_what_has_begun_is_finished_first() -> None:
    actions = plan(Desired(("a", "b"), parallel=1), {"b": advancing(75)}, NOW)
    assert [action.trial_id for action in actions] == ["b"]


def test_retry_after_a_fault_waits_longer_each_time() -> None:
    delays = [assess(standing_still(*[86] * count)).not_before for count in (1, 2, 3)]
    assert delays == [1.0, 2.0, 4.0]
    assert assess(advancing(75)).not_before == 0.0
    assert plan(Desired(("a",), parallel=1), {"a": advancing(None)}, 0.5) == ()


def test_nothing_is_admitted_once_the_gpu_hours_are_spent() -> None:
    seen = {"a": Observed(done=True, attempts=(ended(1, 0, hours=1.0),))}
    desired = Desired(("a", "b"), parallel=1, gpu_hours=2.5)
    assert len(plan(desired, seen, NOW)) == 1
    assert plan(replace(desired, gpu_hours=2.0), seen, NOW) == ()
