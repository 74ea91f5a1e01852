from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase, Verdict
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.hours import Hours
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.why import Explanation, explain
from tests.sweep.sweeps import record_of, write_sweep

NOW = 1.7e9


def explained(runs: Path, folder: Path, seen: Observed, **beat: Any) -> str:
    """Write a heartbeat, and return the facts and attempts that explain the trial."""
    record = record_of(write_sweep(folder, seeds=(0,)))
    run = RunDir(runs / "trials" / record.trial_ids[0])
    if beat:
        write_json(run.status_file, {"state": "training", "step": 5, "total_steps": 10, "loss": None} | beat)
    explanation = explain(record, record.trials[0], runs, seen, now=NOW)
    return "\n".join((*explanation.facts, *explanation.attempts))


LIVE = Observed(job=JobState(Phase.RUNNING, "oc-x.2", 2, "its supervisor is process 7"))


@pytest.mark.parametrize(
    ("beat", "hangs"),
    [
        ({"time": NOW - 1, "stepped": NOW - 300}, True),  # the thread of the heartbeat lives, the training does not
        ({"time": NOW - 1, "stepped": NOW - 10}, False),
        ({"time": NOW - 300}, True),
        ({"time": NOW - 1}, False),  # before the first step
        ({"time": NOW - 1, "stepped": NOW - 300, "state": "evaluating"}, False),  # no more steps will come
        ({"time": NOW - 300, "stepped": NOW - 300, "attempt": 1}, False),  # of the attempt before
    ],
)
def test_live_job_may_hang_if_its_last_step_is_long_ago(
    runs: Path, tmp_path: Path, beat: dict[str, Any], hangs: bool
) -> None:
    assert ("it may hang" in explained(runs, tmp_path, LIVE, **{"attempt": 2, **beat})) is hangs


@pytest.mark.parametrize(
    ("first", "last", "exit_code", "told"),
    [
        (None, None, 1, "training never began"),
        (0, 0, 1, "training never began"),  # the first beat says 0
        (100, 100, 1, "training never began"),
        (100, 120, 1, "steps 100 to 120"),
        (100, 100, 137, "no step was seen"),  # killed before the second beat
    ],
)
def test_attempt_without_a_step_never_began_to_train(
    runs: Path, tmp_path: Path, first: int | None, last: int | None, exit_code: int, told: str
) -> None:
    attempt = AttemptRecord(1, NOW - 9, NOW, 2, exit_code, first_step=first, last_step=last)
    assert told in explained(runs, tmp_path, Observed(attempts=(attempt,)))


def test_trial_that_the_limit_on_hours_keeps_from_going_on_names_it(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,), gpu_hours=2.0))
    stopped = Observed(attempts=(AttemptRecord(1, NOW - 3600, NOW, 2, 75),))

    def told(spent: float, seen: Observed = stopped) -> str:
        hours = Hours(2.0, spent, next_look_seconds=30.0)
        return explain(record, record.trials[0], runs, seen, now=NOW, hours=hours).next_action

    assert "limits.gpu_hours: 2 allowed, 1.99 spent" in told(1.99)
    assert "raise the limit in" in told(1.99)
    assert "limits.gpu_hours" not in told(1.0)
    assert "limits.gpu_hours" not in told(2.5, LIVE)


def told(runs: Path, folder: Path, seen: Observed) -> Explanation:
    record = record_of(write_sweep(folder, seeds=(0,)))
    return explain(record, record.trials[0], runs, seen, now=NOW)


def ended(code: int | None, said: str = "", **values: Any) -> Observed:
    verdict = Verdict(said, "sacct", ("m2",)) if said else None
    attempt = AttemptRecord(1, NOW - 3600, NOW, 2, code, verdict=verdict, **values)
    return Observed(attempts=(attempt,), job=JobState(Phase.FINISHED, "77", 1, "job 77"))


@pytest.mark.parametrize(
    ("seen", "state", "cause", "advice"),
    [
        (ended(75, "CANCELLED"), "HELD", "cancelled", "not by `orchestrate cancel`"),
        (ended(None, "OUT_OF_MEMORY"), "FAILED", "out of memory", "more memory"),
        (ended(2), "FAILED", "bad input", "correct what"),
        (ended(88), "DIVERGED", "diverged", "learning rate"),
        (ended(None, "NODE_FAIL"), "INTERRUPTED", "node failure", "would start attempt 2"),
        (ended(None, "TIMEOUT"), "INTERRUPTED", "time limit", "would start attempt 2"),
        (ended(137, "PREEMPTED"), "INTERRUPTED", "preempted", "would start attempt 2"),
    ],
)
def test_true_cause_and_next_action_are_told(
    runs: Path, tmp_path: Path, seen: Observed, state: str, cause: str, advice: str
) -> None:
    explanation = told(runs, tmp_path, seen)
    assert (explanation.state, explanation.cause) == (state, cause)
    assert advice in explanation.next_action
    assert cause in explanation.attempts[0]


def test_evidence_stands_below_its_attempt(runs: Path, tmp_path: Path) -> None:
    seen = ended(
        1,
        "FAILED",
        nodes=("m1", "m2"),
        failed_rank=1,
        error="KeyError: 'x'",
        blamed=("m2",),
        evidence="task 1 on m2 exited with 1",
        following="job 78 goes on",
    )
    text = "\n".join(told(runs, tmp_path, seen).attempts)
    for fact in ("on m1, m2", "rank 1: KeyError: 'x'", "task 1 on m2", "sacct says: FAILED", "suspected: m2", "job 78"):
        assert fact in text


def test_hours_are_told_by_what_they_bought(runs: Path, tmp_path: Path) -> None:
    seen = ended(75, first_step=0, last_step=100, startup_seconds=360.0, train_seconds=1800.0)
    facts = "\n".join(told(runs, tmp_path, replace(seen, checkpoint_step=50)).facts)
    assert "2.000 rank-hours: 0.500 useful, 0.200 starting up, 0.500 in steps made again, 0.800 otherwise" in facts


def test_job_that_waits_after_a_requeue_is_explained(runs: Path, tmp_path: Path) -> None:
    held = replace(ended(75), job=JobState(Phase.QUEUED, "77", 2, "squeue: PENDING (BeginTime)", held=True))
    assert any("was requeued" in fact for fact in told(runs, tmp_path, held).facts)


def test_silence_of_the_place_is_no_cause(runs: Path, tmp_path: Path) -> None:
    silent = replace(ended(75), job=JobState(Phase.UNKNOWN, "", 0, "squeue: no answer"))
    explanation = told(runs, tmp_path, silent)
    assert explanation.state == "INTERRUPTED"
    assert "nothing is done" in explanation.next_action
