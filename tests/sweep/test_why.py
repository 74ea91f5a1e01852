from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.hours import Hours
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.why import explain
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
