"""Where evaluation is a job of its own: when it starts, what bounds it, and what it means for the trial."""

from dataclasses import replace
from typing import Any

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.causes import Cause
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import Action, Desired, Submit, plan
from orchestrate.sweep.standing import State, assess

NOW = 1e6
DESIRED = Desired(("a",), parallel=4, ranks=8, evaluate_ranks=1)


def job(phase: Phase, attempt: int = 1) -> JobState:
    return JobState(phase, f"7{attempt}", attempt, "squeue")


def attempts(*codes: int | None, start: float = 0.0) -> tuple[AttemptRecord, ...]:
    return tuple(AttemptRecord(n + 1, start + n, start + n + 0.5, 1, code) for n, code in enumerate(codes))


def evaluation(*codes: int | None, start: float = 100.0) -> Observed:
    return Observed(job=job(Phase.FINISHED, len(codes)), attempts=attempts(*codes, start=start))


def trained(**values: Any) -> Observed:
    """A trial whose training ended well at time 0.5, with nothing evaluated."""
    known: dict[str, Any] = {"job": job(Phase.FINISHED), "attempts": attempts(0), "checkpoint_step": 10}
    known |= {"evaluates": True}
    return Observed(**(known | {"trained": True, "to_evaluate": ("step-00000005", "final")} | values))


def planned(seen: Observed, desired: Desired = DESIRED) -> tuple[Action, ...]:
    return plan(desired, {"a": seen}, NOW)


def stages(seen: Observed, desired: Desired = DESIRED) -> list[tuple[str, int]]:
    return [(action.stage, action.attempt) for action in planned(seen, desired) if isinstance(action, Submit)]


def test_trained_trial_is_evaluated_by_a_job_of_its_own() -> None:
    assert assess(trained()).state is State.TRAINED
    assert not State.TRAINED.final
    assert stages(trained()) == [("evaluate", 1)]
    live = trained(evaluation=Observed(job=job(Phase.QUEUED)))
    assert assess(live).state is State.TRAINED
    assert stages(live) == []


def test_milestones_are_evaluated_while_training_goes_on() -> None:
    going = trained(trained=False, to_evaluate=("step-00000005",), job=job(Phase.RUNNING), attempts=attempts(None))
    assert assess(going).state is State.RUNNING
    assert stages(going) == [("evaluate", 1)]
    assert stages(replace(going, to_evaluate=())) == []
    assert stages(going, replace(DESIRED, parallel=1)) == []  # the training has the only place
    again = replace(going, evaluation=evaluation(0))
    assert stages(again) == [("evaluate", 2)]  # a later milestone


def test_failed_evaluation_does_not_keep_training_from_going_on() -> None:
    failing = evaluation(2)
    interrupted = trained(trained=False, attempts=attempts(75), evaluation=failing)
    assert assess(interrupted).state is State.INTERRUPTED
    assert stages(interrupted) == [("pretrain", 2)]


def test_trial_fails_if_its_evaluation_does_after_its_own_retries() -> None:
    retried = trained(evaluation=evaluation(1, 1))
    assert assess(retried).state is State.TRAINED
    assert stages(retried) == [("evaluate", 3)]
    failed = trained(evaluation=evaluation(1, 1, 1))
    assert (assess(failed).state, assess(failed).cause) == (State.FAILED, Cause.USER_ERROR)
    assert "evaluation" in assess(failed).reason
    assert stages(failed) == []
    resumed = trained(evaluation=replace(evaluation(1, 1, 1), forgiven=3))
    assert stages(resumed) == [("evaluate", 4)]


def test_evaluation_that_ends_well_but_scores_nothing_is_not_started_for_ever() -> None:
    useless = trained(evaluation=evaluation(*[0] * 6))
    assert assess(useless).state is State.FAILED
    some_left = trained(trained=False, attempts=attempts(75), evaluation=evaluation(*[0] * 6))
    assert ("evaluate", 7) in stages(some_left)  # of a training that goes on, there is always more


def test_evaluation_that_scores_something_each_time_goes_on() -> None:
    runs = tuple(replace(one, checkpoint_before=n) for n, one in enumerate(attempts(*[75] * 9, start=100.0)))
    slow = trained(evaluation=Observed(job=job(Phase.FINISHED, 9), attempts=runs, checkpoint_step=9))
    assert stages(slow) == [("evaluate", 10)]
    stuck = trained(evaluation=replace(slow.evaluation or Observed(), checkpoint_step=6))
    assert assess(replace(stuck, evaluation=evaluation(75, 75, 75))).state is State.FAILED


def test_without_such_jobs_another_training_job_evaluates() -> None:
    elsewhere = replace(DESIRED, evaluate_ranks=0)
    assert stages(trained(evaluates=False), elsewhere) == [("pretrain", 2)]
    before = evaluation(2)  # of the place where it was
    assert stages(trained(evaluates=False, evaluation=before), elsewhere) == [("pretrain", 2)]
    live = Observed(job=job(Phase.RUNNING))
    assert stages(trained(evaluates=False, evaluation=live), elsewhere) == []


def test_training_job_that_fails_to_evaluate_is_judged() -> None:
    def after_training(*codes: int) -> tuple[AttemptRecord, ...]:
        return tuple(replace(one, checkpoint_before=10 * (one.number > 1)) for one in attempts(0, *codes))

    elsewhere = replace(DESIRED, evaluate_ranks=0)
    for before in (None, evaluation(75)):
        failing = trained(evaluates=False, evaluation=before, attempts=after_training(1, 1, 1))
        assert (assess(failing).state, assess(failing).cause) == (State.FAILED, Cause.USER_ERROR)
        assert stages(failing, elsewhere) == []
        retried = replace(failing, attempts=after_training(137))
        assert assess(retried).state is State.TRAINED
        assert assess(retried).not_before > retried.attempts[-1].ended  # not at once, for ever
        assert stages(replace(failing, attempts=after_training(*[0] * 6)), elsewhere) == []
        assert stages(replace(failing, forgiven=4), elsewhere) == [("pretrain", 5)]


def test_training_that_was_killed_on_its_way_out_is_evaluated() -> None:
    killed = trained(attempts=attempts(89))
    assert assess(killed).state is State.TRAINED
    assert stages(killed) == [("evaluate", 1)]
    scoring = trained(evaluates=False, attempts=attempts(89))  # there it was the evaluation that took the memory
    assert assess(scoring).state is State.FAILED


def test_results_come_before_more_training() -> None:
    desired = replace(DESIRED, trials=("new", "begun", "trained"), parallel=2)
    seen = {"begun": trained(trained=False, to_evaluate=(), attempts=attempts(75)), "trained": trained()}
    assert [action.trial_id for action in plan(desired, seen, NOW)] == ["trained", "begun"]


def test_cancelled_trial_stops_its_evaluation() -> None:
    seen = trained(cancelled=True, evaluation=Observed(job=job(Phase.RUNNING)))
    assert [getattr(action, "job", "") for action in planned(seen)] == ["71"]
    assert stages(trained(cancelled=True)) == []
    assert assess(trained(cancelled=True)).state is State.CANCELLED
