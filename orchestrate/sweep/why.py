"""Explain the state of a trial: the evidence, and what happens next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrate.launchers.base import SIGNAL_BASE, AttemptRecord
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.continuation import first_step, parent_of
from orchestrate.sweep.lease import lease_holder
from orchestrate.sweep.observe import resumed_file, run_dir_of
from orchestrate.sweep.plan import Observed, Standing, State, assess, describe_exit
from orchestrate.sweep.record import SweepRecord, TrialEntry, record_path
from orchestrate.sweep.status import duration
from orchestrate.sweep.tail import last_lines

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

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def explain(
    record: SweepRecord, trial: TrialEntry, runs: Path, seen: Observed, *, now: float, flags: str = ""
) -> Explanation:
    """Collect the evidence for a trial's state; `flags` are added to the command that is suggested."""
    run = run_dir_of(runs, trial.id)
    place = assess(seen)
    log = _decisive_log(run, seen)
    controller = lease_holder(record_path(runs, record.name).parent)
    action, command = _next(record, trial, place, now, controller)
    return Explanation(
        trial=trial.id,
        sweep=record.name,
        state=str(place.state),
        cause=str(place.cause) if place.cause else None,
        reason=place.reason,
        facts=(*_origin(trial), *_facts(run, seen, now)),
        attempts=tuple(_describe(attempt, seen) for attempt in seen.attempts),
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
    if seen.job is not None:
        yield f"the launcher says of {seen.job.job}: {seen.job.phase} ({seen.job.evidence})"


def _sign_of_a_hang(beat: Mapping[str, Any], seen: Observed, now: float) -> Iterator[str]:
    """Doubt a live job whose last step is long ago: its heartbeat comes from a thread that never hangs with it."""
    if seen.job is None or not seen.live or int(beat.get("attempt") or seen.job.attempt) != seen.job.attempt:
        return
    is_stepping = beat.get("state") == "training" and beat.get("stepped")
    what, since = ("last step", beat["stepped"]) if is_stepping else ("heartbeat", beat.get("time") or now)
    if (age := now - float(since)) > STALE_SECONDS:
        yield f"its {what} is {duration(age)} old although the job lives: it may hang"


def _describe(attempt: AttemptRecord, seen: Observed) -> str:
    live = seen.live and seen.job is not None and seen.job.attempt == attempt.number
    is_done = seen.done and attempt.exit_code == 0
    fate = "is running" if live else "done" if is_done else describe_exit(attempt)
    cost = f"{attempt.rank_seconds / 3600:.3f} rank-hours"
    forgiven = ", no longer counts" if attempt.number <= seen.forgiven else ""
    steps = _describe_steps(attempt, live=live)
    return f"attempt {attempt.number}: {attempt.ranks} ranks, {steps}, {cost}: {fate}{forgiven}"


def _describe_steps(attempt: AttemptRecord, *, live: bool) -> str:
    """Say how far an attempt trained; the first heartbeat names a step, 0, before there was one."""
    if (attempt.last_step or 0) > (attempt.first_step or 0):
        return f"steps {attempt.first_step} to {attempt.last_step}"
    if live:
        return "no step yet"
    # A killed worker may have made steps since its last heartbeat.
    was_killed = attempt.exit_code is None or attempt.exit_code >= SIGNAL_BASE
    return "no step was seen" if was_killed and attempt.first_step is not None else "training never began"


def _decisive_log(run: RunDir, seen: Observed) -> Path | None:
    if not seen.attempts:
        return None
    last = seen.attempts[-1]
    rank_log = run.log_file(last.number, last.failed_rank or 0)
    # A command that cannot be started at all leaves its trace with the supervisor.
    candidates = (rank_log, rank_log.with_name("supervisor.log"))
    return next((path for path in candidates if path.exists() and path.stat().st_size), None)


def _next(record: SweepRecord, trial: TrialEntry, place: Standing, now: float, controller: str) -> tuple[str, str]:
    again = f"orchestrate resume {trial.id[:8]}"
    if place.state is State.COMPLETED:
        return "nothing; the results are in", f"orchestrate report {record.name}"
    if place.state in (State.RUNNING, State.QUEUED):
        return "nothing; it goes on by itself", f"orchestrate logs {trial.id[:8]} --follow"
    if place.state is State.CANCELLED:
        return "nothing until a person resumes it", again
    if place.state is State.DIVERGED:
        return "nothing; lower the learning rate in a new trial, or resume it to try this one again", again
    if place.state is State.FAILED:
        return "nothing until a person has mended the cause and resumes it", again
    wait = f" in {duration(place.not_before - now)}" if place.not_before > now + 1 else ""
    if controller:
        return f"{controller} starts attempt {place.next_attempt}{wait}", f"orchestrate status {record.name}"
    return f"no command controls the sweep; one would start attempt {place.next_attempt}{wait}", again


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
