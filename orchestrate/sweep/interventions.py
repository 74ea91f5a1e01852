"""What a person asks of trials: stop them for good, or take them up again."""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrate.launchers.base import Launcher
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.observe import observe, resumed_file, run_dir_of
from orchestrate.sweep.plan import Cause, Observed, State, assess
from orchestrate.sweep.record import TrialEntry

# runs, trials, what was seen of them -> the trials that will be started again
Forgive = Callable[[Path, Iterable[TrialEntry], Mapping[str, Observed]], list[TrialEntry]]

_LOOK_EVERY_SECONDS = 0.2


def cancel_trials(
    runs: Path,
    trials: Iterable[TrialEntry],
    launcher: Launcher,
    *,
    patience_seconds: float,
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Mark trials as cancelled, ask their jobs to save and stop, and watch them do it for a while.

    A trial that is done stays done. The mark comes first, so that no controller starts the trial again.

    Returns:
        Number of trials that are now cancelled.
    """
    by_id = {trial.id: trial for trial in trials}
    for trial_id, seen in observe(runs, by_id, launcher).items():
        if seen.done:
            say(f"{by_id[trial_id].label}: is done already; left as it is")
            continue
        write_json(run_dir_of(runs, trial_id).cancelled_file, {"time": time.time(), "by": _who()})
    # Looked at again: a controller may have started a job before it could see the mark.
    seen_after = observe(runs, by_id, launcher)
    live = {trial_id for trial_id, seen in seen_after.items() if _is_stopping(seen)}
    launcher.cancel([seen.job.job for seen in seen_after.values() if seen.job is not None and _is_stopping(seen)])
    for trial_id in [trial_id for trial_id, seen in seen_after.items() if seen.cancelled and trial_id not in live]:
        say(f"{by_id[trial_id].label}: cancelled; it was not running")
    _watch_stopping(runs, {trial_id: by_id[trial_id] for trial_id in live}, launcher, patience_seconds, say, wait)
    return sum(seen.cancelled and not seen.done for seen in seen_after.values())


def _is_stopping(seen: Observed) -> bool:
    return seen.cancelled and not seen.done and seen.live


def _watch_stopping(
    runs: Path,
    live: Mapping[str, TrialEntry],
    launcher: Launcher,
    patience_seconds: float,
    say: Callable[[str], None],
    wait: Callable[[float], None],
) -> None:
    deadline = time.monotonic() + patience_seconds
    while live and time.monotonic() < deadline:
        seen = observe(runs, live, launcher)
        for trial_id in [trial_id for trial_id in live if not _is_stopping(seen[trial_id])]:
            saved = f"checkpoint at step {seen[trial_id].checkpoint_step}"
            say(
                f"{live[trial_id].label}: cancelled; {saved if seen[trial_id].checkpoint_step else 'no checkpoint yet'}"
            )
        live = {trial_id: trial for trial_id, trial in live.items() if _is_stopping(seen[trial_id])}
        if live:
            wait(_LOOK_EVERY_SECONDS)
    for trial in live.values():
        say(f"{trial.label}: cancelled; its job is still saving, `orchestrate status` shows when it has stopped")


def forgive_trials(
    runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed], *, diverged_too: bool
) -> list[TrialEntry]:
    """Take up again trials that were cancelled, failed or (if asked) diverged: earlier attempts no longer count.

    Also gives up a job whose host cannot be asked any more. Checkpoints stay; training goes on from them.

    Returns:
        The trials that will be started again.
    """
    again = []
    for trial in trials:
        seen = observed[trial.id]
        if not _needs_forgiving(seen, diverged_too=diverged_too):
            continue
        run = run_dir_of(runs, trial.id)
        _forgive(run, seen)
        again.append(trial)
    return again


def forgive_machine_faults(
    runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed]
) -> list[TrialEntry]:
    """Give trials that a machine let down a fresh set of retries; a person who types the command again asks for that.

    User errors, cancelled and diverged trials stay as they are: they need `orchestrate resume`.

    Returns:
        The trials that had no retries left, and will be started again.
    """
    again = []
    for trial in trials:
        place = assess(observed[trial.id])
        if place.state in (State.FAILED, State.INTERRUPTED) and place.cause not in (None, Cause.USER_ERROR):
            _forgive(run_dir_of(runs, trial.id), observed[trial.id])
            if place.state is State.FAILED:
                again.append(trial)
    return again


def _needs_forgiving(seen: Observed, *, diverged_too: bool) -> bool:
    state = assess(seen).state
    if state is State.RUNNING:
        # Cancelled but still saving, or running on a host that cannot be asked.
        return seen.cancelled or not seen.live
    return state in (State.CANCELLED, State.FAILED) or (state is State.DIVERGED and diverged_too)


def _forgive(run: RunDir, seen: Observed) -> None:
    last = max([0, *(attempt.number for attempt in seen.attempts)])
    write_json(resumed_file(run), {"after_attempt": last, "time": time.time(), "by": _who()})
    run.cancelled_file.unlink(missing_ok=True)
    run.stop_file.unlink(missing_ok=True)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this uid, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
