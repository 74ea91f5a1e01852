"""Which nodes the next jobs should keep away from, by what happened on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.sweep.causes import Cause, cause_of

# A node that was mended is given another chance a day later.
MEMORY_SECONDS = 24 * 3600.0
# Once may be bad luck; an attempt that fails its preflight has looked at the node itself.
FAULTS_TO_EXCLUDE = 2
# A list that grew without bound would leave a small partition without nodes.
MOST_EXCLUDED = 16
_SUSPICIOUS = frozenset({Cause.NODE, Cause.HANG, Cause.INFRASTRUCTURE})


def suspects(trials: Iterable[Sequence[AttemptRecord]], now: float) -> tuple[str, ...]:
    """Name the nodes to exclude, those that failed last first.

    A node is excluded after one failed preflight, or after being blamed for two other faults, within a day.

    Args:
        trials: the attempts of each trial that have ended, in order.
        now: unix time.
    """
    proven: dict[str, float] = {}
    blamed: dict[str, list[float]] = defaultdict(list)
    for attempts in trials:
        for attempt in _blaming(attempts, now):
            for node in attempt.blamed:
                if cause_of(attempt) is Cause.PREFLIGHT:
                    proven[node] = max(attempt.ended, proven.get(node, 0.0))
                blamed[node].append(attempt.ended)
    newest = {node: max(times) for node, times in blamed.items() if node in proven or len(times) >= FAULTS_TO_EXCLUDE}
    return tuple(sorted(newest, key=lambda node: (-newest[node], node))[:MOST_EXCLUDED])


def _blaming(attempts: Sequence[AttemptRecord], now: float) -> Iterator[AttemptRecord]:
    """Yield the attempts of a trial that say something against their nodes."""
    num_user_errors = 0
    for attempt in attempts:
        if not attempt.blamed:
            continue
        cause = cause_of(attempt)
        num_user_errors += cause is Cause.USER_ERROR
        # A trial that errs again on another node has shown that it was not the first one's fault.
        is_first_error = cause is Cause.USER_ERROR and num_user_errors == 1
        counts = cause in _SUSPICIOUS or cause is Cause.PREFLIGHT or is_first_error
        if counts and now - attempt.ended <= MEMORY_SECONDS:
            yield attempt
