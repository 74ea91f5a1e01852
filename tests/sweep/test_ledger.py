from typing import Any

import pytest

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.ledger import Ledger, of_training
from orchestrate.sweep.observed import Observed, ledger_of, rank_hours

HOUR = 3600.0


def attempt(number: int, *steps: int, code: int | None = 75, before: int = 0, **values: Any) -> AttemptRecord:
    """An hour of two ranks: a tenth starts up, eight tenths make steps."""
    first, last = steps or (None, None)
    known = {"startup_seconds": 360.0, "train_seconds": 2880.0} if steps else {}
    return AttemptRecord(
        number, 0.0, HOUR, 2, code, first_step=first, last_step=last, checkpoint_before=before, **(known | values)
    )


def test_steps_that_the_next_attempt_makes_again_are_replayed() -> None:
    ledger = of_training([attempt(1, 0, 100), attempt(2, 75, 175, before=75)], 175, safe=False)
    assert ledger.useful == pytest.approx(1.6 * 0.75 + 1.6)
    assert ledger.replayed == pytest.approx(1.6 * 0.25)
    assert ledger.startup == pytest.approx(0.4)
    assert ledger.other == pytest.approx(0.4)


def test_steps_after_a_damaged_checkpoint_are_replayed_too() -> None:
    first, second = attempt(1, 0, 100), attempt(2, 50, 100, before=100)  # found step 100 damaged, and took 50
    ledger = of_training([first, second], 100, safe=True)
    assert ledger.useful == pytest.approx(1.6 * 0.5 + 1.6)
    assert ledger.replayed == pytest.approx(1.6 * 0.5)
    assert ledger.total == pytest.approx(4.0)
    third = attempt(3, 25, 100, before=100)  # and the one before that was damaged later
    assert of_training([first, second, third], 100, safe=True).useful == pytest.approx(1.6 * 0.25 + 1.6)
    killed_early = attempt(3, 0, 0, before=100, code=137)
    assert of_training([first, killed_early], 100, safe=False).replayed == 0


def test_parts_add_up_to_what_was_spent() -> None:
    attempts = [
        attempt(1, code=87),
        attempt(2, 0, 100, code=None),
        attempt(3, 10, 30, before=10, train_seconds=None),
        attempt(4, 30, 90, before=30, train_seconds=9e9, startup_seconds=9e9),
        attempt(5, 60, 100, before=60, code=0),
    ]
    ledger = of_training(attempts, 90, safe=True)
    assert ledger.total == pytest.approx(sum(one.rank_seconds for one in attempts) / HOUR, abs=1e-12)
    assert min(ledger.useful, ledger.startup, ledger.replayed, ledger.other) >= 0
    assert ledger.wasted == pytest.approx(ledger.startup + ledger.replayed + ledger.other)


def test_steps_of_a_live_attempt_are_not_lost_yet() -> None:
    running = attempt(1, 0, 100, code=None)
    job = JobState(Phase.RUNNING, "7", 1, "")
    assert ledger_of(Observed(job=job, attempts=(running,))).replayed == 0
    lost = JobState(Phase.LOST, "7", 1, "")
    assert ledger_of(Observed(job=lost, attempts=(running,))).replayed == pytest.approx(1.6)


def test_live_attempt_counts_until_now() -> None:
    running = Observed(job=JobState(Phase.RUNNING, "7", 1, ""), attempts=(attempt(1, 0, 100, code=None),))
    assert rank_hours({"a": running}) == pytest.approx(2.0)
    assert rank_hours({"a": running}, now=1.5 * HOUR) == pytest.approx(3.0)
    ended = Observed(job=JobState(Phase.LOST, "7", 1, ""), attempts=running.attempts)
    assert rank_hours({"a": ended}, now=1.5 * HOUR) == pytest.approx(2.0)


def test_evaluation_counts_as_useful_if_it_ended_well() -> None:
    jobs = (attempt(1, code=0), attempt(2, code=137))
    ledger = ledger_of(Observed(evaluation=Observed(attempts=jobs)))
    assert (ledger.useful, ledger.other) == (pytest.approx(2.0), pytest.approx(2.0))


def test_queue_hours_are_told_but_cost_nothing() -> None:
    waited = attempt(1, 0, 10, submitted=-1800.0)
    ledger = of_training([waited], 10, safe=False)
    assert ledger.queue == pytest.approx(0.5)
    assert ledger.total == pytest.approx(2.0)
    assert Ledger() + ledger == ledger
