"""Why an attempt ended before its trial was done, from what it left, what its keeper found and what Slurm said."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from orchestrate.exits import SIGNAL_BASE, Exit
from orchestrate.launchers.attempts import AttemptRecord


class Cause(StrEnum):
    """Why an attempt ended before the trial was done."""

    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    NODE = "node failure"
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    PREFLIGHT = "preflight"
    OUT_OF_MEMORY = "out of memory"
    USER_ERROR = "user error"
    BAD_INPUT = "bad input"
    DIVERGED = "diverged"
    CANCELLED = "cancelled"
    NO_PROGRESS = "no progress"

    @property
    def by_machine(self) -> bool:
        """Whether trying again may help although nobody changes anything."""
        return self in _BY_MACHINE


# Retries each cause is worth since the checkpoint last advanced. Preemption is nobody's fault; what a machine does may
# be over next time; a wrong config fails the same way every time, a wrong line of code nearly so.
RETRIES: Mapping[Cause, float] = {
    Cause.PREEMPTED: float("inf"),
    Cause.TIME_LIMIT: float("inf"),
    Cause.NODE: 5,
    Cause.INFRASTRUCTURE: 5,
    Cause.HANG: 3,
    Cause.PREFLIGHT: 16,
    Cause.OUT_OF_MEMORY: 0,
    Cause.USER_ERROR: 2,
    Cause.BAD_INPUT: 0,
    Cause.DIVERGED: 0,
    Cause.CANCELLED: float("inf"),
}
_BY_MACHINE = frozenset(
    {
        Cause.PREEMPTED,
        Cause.TIME_LIMIT,
        Cause.NODE,
        Cause.INFRASTRUCTURE,
        Cause.HANG,
        Cause.PREFLIGHT,
        Cause.NO_PROGRESS,
    }
)
_OF_EXITS = {
    Exit.USER_ERROR: Cause.USER_ERROR,
    Exit.BAD_INPUT: Cause.BAD_INPUT,
    Exit.LATER: Cause.INFRASTRUCTURE,
    Exit.HANG: Cause.HANG,
    Exit.PREFLIGHT: Cause.PREFLIGHT,
    Exit.DIVERGED: Cause.DIVERGED,
    Exit.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
}
_OF_VERDICTS = {
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "DEADLINE": Cause.TIME_LIMIT,
    "NODE_FAIL": Cause.NODE,
    "BOOT_FAIL": Cause.NODE,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "CANCELLED": Cause.CANCELLED,
}
# Slurm may signal a minute before it was asked to, and checks limits about twice a minute.
_SLACK_SECONDS = 90.0


def cause_of(attempt: AttemptRecord) -> Cause:
    """Name the cause of an attempt that ended without completing its trial.

    What its ranks said by their exit code counts first; then what its keeper found, what the scheduler said, what the
    worker was asked to do, and the clock. What nothing explains is the machines' fault.
    """
    code, said = attempt.exit_code, _said_by_scheduler(attempt)
    if code == Exit.CONTINUE:
        return _cause_of_stop(attempt, said)
    told = {_found_by_keeper(attempt), said}
    if code in (Exit.HANG, Exit.USER_ERROR) and Cause.NODE in told:
        return Cause.NODE  # ranks wait in a collective for those that were on the lost node, or trip over their end
    if code == Exit.USER_ERROR and Cause.OUT_OF_MEMORY in told:
        return Cause.OUT_OF_MEMORY  # a loader's process was killed, which its rank takes for an error
    if code in _OF_EXITS:
        return _OF_EXITS[Exit(code)]
    if code not in (None, Exit.DONE, Exit.PEER_LOST) and code < SIGNAL_BASE:
        return Cause.USER_ERROR
    return _found_by_keeper(attempt) or said or _asked_of_worker(attempt) or _by_clock(attempt) or Cause.INFRASTRUCTURE


def _cause_of_stop(attempt: AttemptRecord, said: Cause | None) -> Cause:
    """Say why a job that saved was asked to."""
    if said is Cause.CANCELLED and not attempt.following:
        return said
    at_its_end = Cause.TIME_LIMIT if attempt.stop_reason == "deadline" else _by_clock(attempt)
    return at_its_end or _found_by_keeper(attempt) or Cause.PREEMPTED


def _said_by_scheduler(attempt: AttemptRecord) -> Cause | None:
    return _OF_VERDICTS.get(attempt.verdict.state) if attempt.verdict else None


def _found_by_keeper(attempt: AttemptRecord) -> Cause | None:
    return Cause(attempt.hint) if attempt.hint in RETRIES else None


def _asked_of_worker(attempt: AttemptRecord) -> Cause | None:
    if attempt.stop_reason == "deadline":
        return Cause.TIME_LIMIT
    return Cause.PREEMPTED if attempt.stop_reason else None


def _by_clock(attempt: AttemptRecord) -> Cause | None:
    if attempt.ends is None or attempt.ended < attempt.ends - attempt.lead_seconds - _SLACK_SECONDS:
        return None
    return Cause.TIME_LIMIT


def describe_exit(attempt: AttemptRecord) -> str:
    """Say how an attempt ended, in a few words."""
    code = attempt.exit_code
    said = f"the scheduler says {attempt.verdict.state}" if attempt.verdict else ""
    if not attempt.has_begun:
        return f"it never began, {said}" if said else "it never began"
    if code is None:
        return f"no exit code: {said or 'lost or killed'}"
    if code == Exit.DONE:
        return "exit 0 without results/done.json"
    rank = "" if attempt.failed_rank is None else f" of rank {attempt.failed_rank}"
    stopped = f", stopped by {attempt.stopped_by}" if attempt.stopped_by else ""
    return f"exit code {code}{rank}{stopped}" + (f", {said}" if said and code >= SIGNAL_BASE else "")
