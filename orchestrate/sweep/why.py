"""Explain the state of a trial: the evidence, and what happens next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.code import code_of
from orchestrate.sweep.continuation import first_step, parent_of
from orchestrate.sweep.hours import UNLIMITED, Hours
from orchestrate.sweep.lease import lease_holder
from orchestrate.sweep.observe import resumed_file, run_dir_of
from orchestrate.sweep.observed import Observed, ledger_of
from orchestrate.sweep.record import SweepRecord, TrialEntry, record_path
from orchestrate.sweep.standing import State, assess
from orchestrate.sweep.status import duration
from orchestrate.sweep.tail import last_lines
from orchestrate.sweep.why_attempts import describe_attempts
from orchestrate.sweep.why_next import next_step

LOG_LINES = 15
# A worker writes its heartbeat every few seconds.
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Explanation:
    """Why a trial is where it is.

    Attributes:
        state, cause, reason: as the controller decides it.
        facts: what the files say, a sentence each.
        attempts: every attempt and how it ended, a sentence each.
        log_file, log_lines: end of the log of the rank that decided the last attempt.
        next_action, command: what happens or should be done next, and what to type.
    """

    trial: str
    sweep: str
    state: str
    cause: str | None
    reason: str
    facts: tuple[str, ...]
    attempts: tuple[str, ...]
    log_file: str | None
    log_lines: tuple[str, ...]
    next_action: str
    command: str


def explain(
    record: SweepRecord,
    trial: TrialEntry,
    runs: Path,
    seen: Observed,
    *,
    now: float,
    hours: Hours = UNLIMITED,
    flags: str = "",
) -> Explanation:
    """Collect the evidence for a trial's state.

    Args:
        record, trial: of which sweep and trial.
        runs: folder with `trials/`.
        seen: what was seen of the trial.
        now: unix time.
        hours: what the sweep may spend and has spent.
        flags: added to the command that is suggested.
    """
    run = run_dir_of(runs, trial.id)
    place = assess(seen)
    run_of_log, view = _decisive_stage(run, seen)
    log = _decisive_log(run_of_log, view)
    controller = lease_holder(record_path(runs, record.name).parent)
    action, command = next_step(record, trial, seen, now, controller=controller, hours=hours)
    return Explanation(
        trial=trial.id,
        sweep=record.name,
        state=str(place.state),
        cause=str(place.cause) if place.cause else None,
        reason=place.reason,
        facts=(*_origin(trial), *_facts(run, seen, now), *_job_facts(seen), *_costs(seen, now)),
        attempts=tuple(describe_attempts(seen)),
        log_file=str(log) if log else None,
        log_lines=tuple(last_lines(log, LOG_LINES)) if log and place.state is not State.COMPLETED else (),
        next_action=action,
        command=command + flags,
    )


def _origin(trial: TrialEntry) -> Iterator[str]:
    if parent_of(trial):
        yield f"continues trial {parent_of(trial)} from its checkpoint of step {first_step(trial)}"


def _facts(run: RunDir, seen: Observed, now: float) -> Iterator[str]:
    files = (run.config_file, run.status_file, run.metrics_file, run.done_file, run.cancelled_file, resumed_file(run))
    for path in (*files, run.stop_file):
        if path.exists():
            age = duration(max(0.0, now - path.stat().st_mtime))
            yield f"{path.relative_to(run.path)}: written {age} ago"
    done = read_json(run.done_file)
    if done is not None and not seen.done:
        yield f"results/done.json is not counted: it carries another trial's fingerprint, {done.get('fingerprint')}"
    beat = read_json(run.status_file)
    if beat is not None:
        step = f"step {beat.get('step')} of {beat.get('total_steps')}"
        loss = beat.get("loss")
        yield f"the worker last said: {beat.get('state')}, {step}" + (f", loss {loss:.4g}" if loss is not None else "")
        yield from _sign_of_a_hang(beat, seen, now)
    yield f"newest checkpoint: step {seen.checkpoint_step}" if seen.checkpoint_step else "no checkpoint yet"
    if code := code_of(run):
        yield f"runs the code {code}, frozen in {code.path}"
    if seen.to_evaluate:
        yield f"not evaluated yet: {', '.join(seen.to_evaluate)}"


def _job_facts(seen: Observed) -> Iterator[str]:
    """Say what the launcher says of the jobs, and what the scheduler said of them that is in no file."""
    for what, view in (("job", seen), ("evaluation", seen.evaluation)):
        if view is None or view.job is None:
            continue
        name = f"{what} {view.job.job}" if view.job.job else f"the {what}"
        yield f"the launcher says of {name}: {view.job.phase} ({view.job.evidence})"
        if view.job.held:
            yield f"{name} was requeued, so the scheduler lets it wait for about two minutes, or until we release it"
        if view.job.hold:
            yield f"{name} is held in Slurm; this lets it start: {view.job.hold}"
        if view.job.nodes:
            yield f"{name} has {', '.join(view.job.nodes)}"


def _costs(seen: Observed, now: float) -> Iterator[str]:
    """Say what the hours of ranks went into."""
    hours = ledger_of(seen.until(now))
    if hours.total:
        parts = (
            f"{getattr(hours, part):.3f} {word}"
            for part, word in (
                ("useful", "useful"),
                ("startup", "starting up"),
                ("replayed", "in steps made again"),
                ("other", "otherwise"),
            )
        )
        yield f"{hours.total:.3f} rank-hours: {', '.join(parts)}"
    if hours.queue:
        yield f"{hours.queue:.3f} hours in the queue"


def _sign_of_a_hang(beat: Mapping[str, Any], seen: Observed, now: float) -> Iterator[str]:
    """Doubt a live job whose last step is long ago: its heartbeat comes from a thread that never hangs with it."""
    if seen.job is None or not seen.live or int(beat.get("attempt") or seen.job.attempt) != seen.job.attempt:
        return
    is_stepping = beat.get("state") == "training" and beat.get("stepped")
    what, since = ("last step", beat["stepped"]) if is_stepping else ("heartbeat", beat.get("time") or now)
    if (age := now - float(since)) > STALE_SECONDS:
        yield f"its {what} is {duration(age)} old although the job lives: it may hang"


def _decisive_stage(run: RunDir, seen: Observed) -> tuple[RunDir, Observed]:
    """Return the folder and view of the stage that the state of the trial hangs on."""
    if seen.trained and seen.evaluation is not None and seen.evaluation.attempts:
        return run.evaluation, seen.evaluation
    return run, seen


def _decisive_log(run: RunDir, seen: Observed) -> Path | None:
    if not seen.attempts:
        return None
    last = seen.attempts[-1]
    rank_log = run.log_file(last.number, last.failed_rank or 0)
    # A command that cannot be started at all leaves its trace with the supervisor.
    candidates = (rank_log, rank_log.with_name("supervisor.log"))
    return next((path for path in candidates if path.exists() and path.stat().st_size), None)


def render(explanation: Explanation) -> str:
    """Write an explanation for people."""
    cause = f" ({explanation.cause})" if explanation.cause else ""
    lines = [f"trial {explanation.trial} of sweep {explanation.sweep}: {explanation.state}{cause}", explanation.reason]
    lines += ["", "evidence", *(f"  {fact}" for fact in explanation.facts)]
    if explanation.attempts:
        lines += ["", "attempts", *(f"  {attempt}" for attempt in explanation.attempts)]
    if explanation.log_lines:
        lines += ["", f"end of {explanation.log_file}", *(f"  | {line}" for line in explanation.log_lines)]
    lines += ["", f"next: {explanation.next_action}", f"      {explanation.command}"]
    return "\n".join(lines)
