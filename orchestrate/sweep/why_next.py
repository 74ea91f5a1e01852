"""Say what happens next with a trial, or what a person should do."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from orchestrate.sweep.causes import Cause
from orchestrate.sweep.hours import Hours
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, TrialEntry
from orchestrate.sweep.standing import Standing, State, assess, assess_evaluation
from orchestrate.sweep.status import duration

# What to mend before a trial that failed of a cause is resumed.
_MEND: Mapping[Cause | None, str] = {
    Cause.OUT_OF_MEMORY: "give its jobs more memory or more ranks in the cluster config, and resume it",
    Cause.USER_ERROR: "mend the error at the end of its log, and resume it",
    Cause.BAD_INPUT: "correct what the end of its log names, and resume it",
    Cause.HANG: "read the stacks of all ranks in its logs for what they wait for, and resume it",
    Cause.PREFLIGHT: "the nodes that it got are not fit; tell who runs them, or exclude them, and resume it",
    Cause.NODE: "its nodes fail again and again; tell who runs them, or exclude them, and resume it",
    Cause.INFRASTRUCTURE: "look at the end of its log for what the place does to it, and resume it",
    Cause.NO_PROGRESS: "its jobs end before they have saved; let it save more often or run for longer, and resume it",
}


def next_step(
    record: SweepRecord, trial: TrialEntry, seen: Observed, now: float, *, controller: str, hours: Hours
) -> tuple[str, str]:
    """Return what happens or should be done next, and what to type.

    Args:
        record, trial: of which sweep and trial.
        seen: what was seen of the trial.
        now: unix time.
        controller: who controls the sweep now; empty if nobody does.
        hours: what the sweep may spend and has spent.
    """
    place = assess(seen)
    again = f"orchestrate resume {trial.id[:8]}"
    if place.state is State.COMPLETED:
        return "nothing; the results are in", f"orchestrate report {record.name}"
    if hold := next((job.hold for job in seen.live_jobs if job.hold), ""):
        first = "nothing until a person has seen why its nodes do not launch it, and releases it"
        return first if place.state is State.HELD else "nothing until somebody releases its job in Slurm", hold
    if place.state.final:
        return _of_final(place), again
    if seen.is_unknown:
        return "nothing is done about it until the question is answered", f"orchestrate why {trial.id[:8]}"
    if place.state in (State.RUNNING, State.QUEUED):
        held = any(job.held for job in seen.live_jobs)
        wait = "; the controller ends its wait" if held and controller else ""
        return f"nothing; it goes on by itself{wait}", f"orchestrate logs {trial.id[:8]} --follow"
    if seen.evaluation is not None and seen.evaluation.live:
        return "nothing; its evaluation goes on by itself", f"orchestrate why {trial.id[:8]}"
    what, stage = _what_starts(record, seen, place)
    if limit := hours.why_too_few(record.cluster_config().stage_resources(stage).ranks):
        raised = (
            f"nothing: {limit}, so {what} is not started; raise the limit in {record.file}, and type the same again"
        )
        return raised, shlex.join(record.command)
    wait = f" in {duration(place.not_before - now)}" if place.not_before > now + 1 else ""
    if controller:
        return f"{controller} starts {what}{wait}", f"orchestrate status {record.name}"
    return f"no command controls the sweep; one would start {what}{wait}", again


def _of_final(place: Standing) -> str:
    if place.state is State.CANCELLED:
        return "nothing until a person resumes it"
    if place.state is State.HELD:
        return "nothing until a person resumes it: its job was cancelled, and not by `orchestrate cancel`"
    if place.state is State.DIVERGED:
        return "nothing; lower the learning rate in a new trial, or resume it to try this one again"
    return f"nothing until a person has mended the cause: {_MEND.get(place.cause, 'see its log')}"


def _what_starts(record: SweepRecord, seen: Observed, place: Standing) -> tuple[str, str]:
    """Return what is to be started, in words, and its stage."""
    if place.state is State.TRAINED and record.cluster_config().evaluate is not None:
        return f"attempt {assess_evaluation(seen).next_attempt} at its evaluation", "evaluate"
    return f"attempt {place.next_attempt}", "pretrain"
