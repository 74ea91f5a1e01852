"""Describe attempts: how far each came, where, what it cost, and how it ended with the evidence for it."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrate.exits import SIGNAL_BASE, Exit
from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.sweep.causes import cause_of, describe_exit
from orchestrate.sweep.observed import Observed


def describe_attempts(seen: Observed) -> Iterator[str]:
    """Yield a sentence for each attempt at a trial, with a line for each piece of evidence below it."""
    stages = [("attempt", seen, seen.done or seen.trained)]
    if seen.evaluation is not None:
        stages.append(("evaluation attempt", seen.evaluation, True))
    for stage, view, proven in stages:
        for attempt in view.attempts:
            yield f"{stage} {_describe(attempt, view, proven=proven)}"
            yield from (f"  {fact}" for fact in _evidence(attempt))


def _describe(attempt: AttemptRecord, seen: Observed, *, proven: bool) -> str:
    live = seen.live_attempt is attempt
    ended = "done" if proven and attempt.exit_code == Exit.DONE else f"{cause_of(attempt)}, {describe_exit(attempt)}"
    fate = "is running" if live else ended
    forgiven = ", no longer counts" if attempt.number <= seen.forgiven else ""
    if not attempt.has_begun:
        return f"{attempt.number}: {fate}{forgiven}"
    cost = f"{attempt.rank_seconds / 3600:.3f} rank-hours"
    where = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
    steps = _describe_steps(attempt, live=live)
    return f"{attempt.number}: {attempt.ranks} ranks{where}, {steps}, {cost}: {fate}{forgiven}"


def _describe_steps(attempt: AttemptRecord, *, live: bool) -> str:
    """Say how far an attempt trained; the first heartbeat names a step, 0, before there was one."""
    if (attempt.last_step or 0) > (attempt.first_step or 0):
        return f"steps {attempt.first_step} to {attempt.last_step}"
    if live:
        return "no step yet"
    # A killed worker may have made steps since its last heartbeat.
    was_killed = attempt.exit_code is None or attempt.exit_code >= SIGNAL_BASE
    return "no step was seen" if was_killed and attempt.first_step is not None else "training never began"


def _evidence(attempt: AttemptRecord) -> Iterator[str]:
    """Yield what speaks for the cause of an attempt's end."""
    if attempt.error:
        rank = "" if attempt.failed_rank is None else f"rank {attempt.failed_rank}: "
        yield f"{rank}{attempt.error}"
    if attempt.stop_reason:
        yield f"the worker was asked to save and stop by {attempt.stop_reason}"
    if attempt.evidence:
        yield f"its keeper found: {attempt.evidence}" + (f" (so: {attempt.hint})" if attempt.hint else "")
    if attempt.verdict is not None:
        asked = ", as we had asked" if attempt.asked_to_end else ""
        where = f" on {', '.join(attempt.verdict.nodes)}" if attempt.verdict.nodes else ""
        yield f"{attempt.verdict.source} says: {attempt.verdict.state}{where}{asked}"
    if attempt.blamed:
        yield f"suspected: {', '.join(attempt.blamed)}"
    if attempt.following:
        yield f"then: {attempt.following}"
