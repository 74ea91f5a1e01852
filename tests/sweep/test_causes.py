from typing import Any

import pytest

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import Verdict
from orchestrate.sweep.causes import Cause, cause_of, describe_exit

LIMIT = 7200.0


def attempt(code: int | None, said: str = "", **values: Any) -> AttemptRecord:
    verdict = Verdict(said, "sacct") if said else None
    return AttemptRecord(1, 0.0, values.pop("ended", 600.0), 2, code, verdict=verdict, **values)


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (attempt(75), Cause.PREEMPTED),
        (attempt(75, stop_reason="SIGTERM"), Cause.PREEMPTED),
        (attempt(75, stop_reason="deadline"), Cause.TIME_LIMIT),
        (attempt(75, stop_reason="SIGUSR1", ends=LIMIT, ended=LIMIT - 100), Cause.TIME_LIMIT),
        (attempt(75, stop_reason="SIGUSR1", ends=LIMIT, ended=LIMIT - 3000), Cause.PREEMPTED),
        (attempt(75, hint="node failure"), Cause.NODE),
        (attempt(75, "TIMEOUT"), Cause.PREEMPTED),  # it saved in time; what Slurm says of the rest is late
        (attempt(75, "CANCELLED"), Cause.CANCELLED),
        (attempt(75, "CANCELLED", following="job 124 goes on"), Cause.PREEMPTED),
        (attempt(86), Cause.HANG),
        (attempt(86, "NODE_FAIL"), Cause.NODE),
        (attempt(86, hint="node failure"), Cause.NODE),
        (attempt(88, "OUT_OF_MEMORY"), Cause.DIVERGED),
        (attempt(137), Cause.INFRASTRUCTURE),
        (attempt(137, hint="out of memory"), Cause.OUT_OF_MEMORY),
        (attempt(137, "PREEMPTED", hint="out of memory"), Cause.OUT_OF_MEMORY),
        (attempt(137, "PREEMPTED"), Cause.PREEMPTED),
        (attempt(143, "CANCELLED"), Cause.CANCELLED),
        (attempt(76, "NODE_FAIL"), Cause.NODE),
        (attempt(None, "NODE_FAIL"), Cause.NODE),
        (attempt(None, "BOOT_FAIL"), Cause.NODE),
        (attempt(None, "TIMEOUT"), Cause.TIME_LIMIT),
        (attempt(None, "DEADLINE"), Cause.TIME_LIMIT),
        (attempt(None, "OUT_OF_MEMORY"), Cause.OUT_OF_MEMORY),
        (attempt(None, "CANCELLED"), Cause.CANCELLED),
        (attempt(None, "FAILED"), Cause.INFRASTRUCTURE),
        (attempt(None, "SOMETHING_NEW", hint="a word of another version"), Cause.INFRASTRUCTURE),
        (attempt(None, stop_reason="SIGTERM"), Cause.PREEMPTED),
        (attempt(137, ends=LIMIT, ended=LIMIT + 20), Cause.TIME_LIMIT),
        (attempt(0), Cause.INFRASTRUCTURE),
        (attempt(0, "TIMEOUT"), Cause.TIME_LIMIT),
        (attempt(1), Cause.USER_ERROR),
        (attempt(1, "FAILED"), Cause.USER_ERROR),
        (attempt(1, "PREEMPTED"), Cause.USER_ERROR),
        (attempt(1, "NODE_FAIL"), Cause.NODE),
        (attempt(1, hint="node failure"), Cause.NODE),
        (attempt(1, "OUT_OF_MEMORY"), Cause.OUT_OF_MEMORY),  # of a loader's process
        (attempt(1, hint="out of memory"), Cause.OUT_OF_MEMORY),
        (attempt(1, "NODE_FAIL", hint="out of memory"), Cause.NODE),
    ],
)
def test_cause_is_found_in_what_the_attempt_left_then_in_what_slurm_says(ended: AttemptRecord, cause: Cause) -> None:
    assert cause_of(ended) is cause


def test_job_that_was_dropped_in_the_queue_has_the_cause_that_slurm_gives() -> None:
    dropped = AttemptRecord(1, 5.0, 5.0, 0, None, verdict=Verdict("CANCELLED", "squeue"))
    assert cause_of(dropped) is Cause.CANCELLED
    assert describe_exit(dropped) == "it never began, the scheduler says CANCELLED"
