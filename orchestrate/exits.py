"""Exit codes: what a rank says by the way it ends, and what all ranks together say of their job."""

import signal
from collections.abc import Sequence
from enum import IntEnum

# Added to 128 when a process ends by a signal, as shells do: 137 is SIGKILL.
SIGNAL_BASE = 128
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})


class Exit(IntEnum):
    """Codes that both planes know; any other code is an error of the user's."""

    DONE = 0
    USER_ERROR = 1
    BAD_INPUT = 2
    LATER = 74  # EX_IOERR of sysexits.h: a store does not answer, or somebody else holds the trial
    CONTINUE = 75  # EX_TEMPFAIL: the state is saved, go on from there
    PEER_LOST = 76  # a collective broke because another rank is gone
    HANG = 86
    PREFLIGHT = 87  # a node is not fit to run
    DIVERGED = 88
    OUT_OF_MEMORY = 89


# No other rank's end causes these, so that one rank's word is enough.
_NEVER_A_CONSEQUENCE = (Exit.DIVERGED, Exit.PREFLIGHT)
# Nor these, but a rank that hangs may be what the others then trip over.
_CAUSES_UNLESS_HUNG = (Exit.OUT_OF_MEMORY, Exit.BAD_INPUT, Exit.LATER)


def group_exit_code(codes: Sequence[int], first: Sequence[int], *, stopping: bool) -> int:
    """Decide the exit code of a job from those of its ranks.

    Args:
        codes: return code of every rank; negative for a signal.
        first: those that came before anyone was asked to end because of another's failure.
        stopping: whether a person or scheduler asked the job to stop.

    Returns:
        0 if all are 0. Else 88 or 87 if any rank says so, as no other rank's end causes these; else 86 if it is among
        the first failures; else 89, 2 or 74 if any rank says so, for the same reason; else the first failure: a signal
        (128 + its number), then any other code, 75 before the rest, and 76 only if no rank says anything else.
    """
    for code in _NEVER_A_CONSEQUENCE:
        if code in codes:
            return code
    asked = {Exit.DONE, Exit.CONTINUE, Exit.PEER_LOST, *(-number for number in STOP_SIGNALS)}
    # A rank that is stopped while it still imports has no handler yet and dies of the signal.
    if stopping and set(codes) & {*asked} - {Exit.DONE, Exit.PEER_LOST} and set(codes) <= asked:
        return Exit.CONTINUE
    failures = [code for code in first if code] or [code for code in codes if code]
    if not failures:
        return Exit.DONE
    if Exit.HANG not in failures:
        for code in _CAUSES_UNLESS_HUNG:
            if code in codes:
                return code
    if set(failures) == {Exit.PEER_LOST}:  # whose peer was lost? those that were told to end say it, if they can
        failures += [code for code in codes if code and -code not in STOP_SIGNALS and code != Exit.CONTINUE]
    chosen = min(failures, key=_rank_of_failure)
    return SIGNAL_BASE - chosen if chosen < 0 else chosen


def _rank_of_failure(code: int) -> int:
    if code == Exit.HANG:
        return 0
    if code == Exit.PEER_LOST:
        return 4
    return 1 if code < 0 else 2 if code == Exit.CONTINUE else 3
