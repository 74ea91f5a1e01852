"""What a person asks of trials: stop them for good, or take them up again."""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrate.errors import RunDirError
from orchestrate.launchers.base import Launcher, TryLaterError
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.observe import observe, resumed_file, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import TrialEntry
from orchestrate.sweep.standing import State, assess
from orchestrate.sweep.stopping import Stopping

# runs, trials, what was seen of them -> the trials that will be started again
Forgive = Callable[[Path, Iterable[TrialEntry], Mapping[str, Observed]], list[TrialEntry]]

# Workers give up saving after two minutes, and schedulers take their time to kill.
LONGEST_MOVE_SECONDS = 600.0
_TELL_EVERY_SECONDS = 15.0
ABANDON = "--abandon-jobs"


def cancel_trials(
    runs: Path,
    trials: Iterable[TrialEntry],
    launcher: Launcher,
    *,
    patience_seconds: float,
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Mark trials as cancelled, ask their jobs of every stage to save and stop, and watch them do it for a while.

    A trial that is done stays done. The mark comes first, so that no controller, and no job, starts the trial again.

    Returns:
        Number of trials that are now cancelled.

    Raises:
        TryLaterError: the jobs could not be asked; the marks stay.
    """
    by_id = {trial.id: trial for trial in trials}
    for trial_id, seen in observe(runs, by_id, launcher).items():
        if seen.done:
            say(f"{by_id.pop(trial_id).label}: is done already; left as it is")
        else:
            write_json(run_dir_of(runs, trial_id).cancelled_file, {"time": time.time(), "by": _who()})
    num_done = 0

    def stopped(trial: TrialEntry, seen: Observed, was_asked: bool) -> None:
        nonlocal num_done
        num_done += seen.done
        saved = f"checkpoint at step {seen.checkpoint_step}" if seen.checkpoint_step else "no checkpoint yet"
        say(
            f"{trial.label}: "
            + ("was done first" if seen.done else f"cancelled; {saved if was_asked else 'it was not running'}")
        )

    stopping = Stopping(runs, by_id.values(), launcher, stopped=stopped, wait=wait)
    try:
        stopping.watch(patience_seconds)
    except TryLaterError as error:
        raise TryLaterError(
            f"{error}; the trials are marked and jobs that run stop by themselves; the same command again drops those "
            "that wait"
        ) from error
    for trial in stopping.open.values():
        todo = "`orchestrate status` shows when it has stopped"
        if stopping.is_silent(trial.id):
            todo = "one that runs stops by itself; run the same command again to drop one that waits"
        say(f"{trial.label}: cancelled; {stopping.why_open(trial.id)}; {todo}")
    return len(by_id) - num_done


def move_away(
    runs: Path,
    trials: Iterable[TrialEntry],
    launcher: Launcher,
    *,
    say: Callable[[str], None],
    abandons: bool = False,
    patience_seconds: float = LONGEST_MOVE_SECONDS,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Ask the jobs of trials to save and stop where they are, and wait until none lives, so that another place goes on.

    A trial whose last job left its end, with nothing to follow, has stopped, whether or not the place answers.

    Args:
        runs: folder with `trials/`.
        trials: that leave.
        launcher: of the place that they leave.
        say: tells a person.
        abandons: whether to give up, soon, jobs of which nobody can tell whether they live.
        patience_seconds: that the jobs have.
        wait: pauses between looks.

    Raises:
        RunDirError: one does not stop, or nobody can tell.
        TryLaterError: the place does not answer to the request.
    """

    def stopped(trial: TrialEntry, seen: Observed, was_asked: bool) -> None:
        if was_asked:
            say(f"{trial.label}: has stopped where it was; its newest checkpoint is of step {seen.checkpoint_step}")

    stopping = Stopping(runs, trials, launcher, stopped=stopped, wait=wait)
    began, at_once = time.monotonic(), min(_TELL_EVERY_SECONDS, patience_seconds)
    stopping.watch(at_once)
    while stopping.open:
        waited = time.monotonic() - began
        silent = [trial for trial in stopping.open.values() if stopping.is_silent(trial.id)]
        if abandons and silent:
            for trial in silent:
                del stopping.open[trial.id]
                say(f"{trial.label}: goes on although {stopping.why_open(trial.id)}")
            continue
        told = [f"{trial.label}: {stopping.why_open(trial.id)}" for trial in stopping.open.values()]
        way = f"; if none runs there any more, {ABANDON} goes on without asking" if silent else ""
        if waited > patience_seconds:
            problem = "not moved, as jobs under the cluster file of before do not stop"
            raise RunDirError(
                "\n".join([*told, f"{problem}; `orchestrate resume` without --cluster goes on there{way}"])
            )
        say(f"waiting for jobs to stop where they are ({waited:.0f} s): {'; '.join(told)}{way}")
        stopping.watch(at_once)


def forgive_trials(
    runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed], *, diverged_too: bool
) -> list[TrialEntry]:
    """Take up again trials that were cancelled, held, failed or (if asked) diverged: earlier attempts no longer count.

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

    User errors, cancelled, held and diverged trials stay as they are: they need `orchestrate resume`.

    Returns:
        The trials that had no retries left, and will be started again.
    """
    again = []
    for trial in trials:
        place = assess(observed[trial.id])
        is_over = place.state in (State.FAILED, State.INTERRUPTED) and not observed[trial.id].is_unknown
        if is_over and place.cause is not None and place.cause.by_machine:
            _forgive(run_dir_of(runs, trial.id), observed[trial.id])
            if place.state is State.FAILED:
                again.append(trial)
    return again


def _needs_forgiving(seen: Observed, *, diverged_too: bool) -> bool:
    state = assess(seen).state
    if state is State.RUNNING:
        # Cancelled but still saving, or running on a host that cannot be asked.
        return seen.cancelled or not seen.live
    return state in (State.CANCELLED, State.HELD, State.FAILED) or (state is State.DIVERGED and diverged_too)


def _forgive(run: RunDir, seen: Observed) -> None:
    last = max([0, *(attempt.number for attempt in seen.attempts)])
    write_json(resumed_file(run), {"after_attempt": last, "time": time.time(), "by": _who()})
    run.cancelled_file.unlink(missing_ok=True)
    run.stop_file.unlink(missing_ok=True)
    run.evaluation.stop_file.unlink(missing_ok=True)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this uid, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
