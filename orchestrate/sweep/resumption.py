"""What `orchestrate resume` does to trials before they go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrate.errors import RunDirError
from orchestrate.launchers.base import Launcher
from orchestrate.sweep.code import freeze, renew_code
from orchestrate.sweep.interventions import LONGEST_MOVE_SECONDS, forgive_trials, move_away
from orchestrate.sweep.observe import done_record, observe, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted, save_record

# Sections of a cluster file that a job cannot change once it is submitted.
_WHAT_A_JOB_HAS = ("launcher", "resources", "evaluate", "environment", "slurm")


@dataclass(frozen=True)
class Resumption:
    """Let trials go on elsewhere, with the code of now, with a fresh set of retries; a `Forgive`.

    Attributes:
        launcher: of the place where they go on.
        left: the sweep as it was, and the launcher of the place that its jobs leave; None if they stay.
        renews_code: whether trials run frozen code.
        diverged_too: whether diverged trials are tried again.
        say: tells a person.
        patience_seconds: that jobs have to stop where they were.
        wait: pauses between looks.
    """

    launcher: Launcher
    left: tuple[SweepRecord, Launcher] | None
    renews_code: bool
    diverged_too: bool
    say: Callable[[str], None]
    patience_seconds: float = LONGEST_MOVE_SECONDS
    wait: Callable[[float], None] = time.sleep

    def __call__(self, runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed]) -> list[TrialEntry]:
        """Prepare trials to go on; return those that will be started again."""
        still_open = [trial for trial in trials if done_record(run_dir_of(runs, trial.id)) is None]
        if self.left is not None and still_open:
            self._move(runs, still_open, *self.left)
            observed = observe(runs, [trial.id for trial in still_open], self.launcher)
        if self.renews_code and still_open:
            self._renew_code(runs, still_open)
        return forgive_trials(runs, still_open, observed, diverged_too=self.diverged_too)

    def _move(self, runs: Path, trials: Collection[TrialEntry], before: SweepRecord, launcher: Launcher) -> None:
        try:
            self._refuse_to_split(runs, [trial.id for trial in trials], before, launcher)
            move_away(runs, trials, launcher, say=self.say, patience_seconds=self.patience_seconds, wait=self.wait)
        except BaseException:
            save_record(runs, before)  # the jobs are still there, and have to be looked for there
            raise

    def _refuse_to_split(self, runs: Path, moving: Collection[str], before: SweepRecord, launcher: Launcher) -> None:
        """Refuse to leave jobs behind where nobody would look for them: a sweep is at one place."""
        others = [trial for trial in before.trials if trial.id not in moving]
        seen = (
            observe(runs, [trial.id for trial in others], launcher) if type(launcher) is not type(self.launcher) else {}
        )
        live = [trial.label for trial in others if trial.id in seen and seen[trial.id].live_jobs]
        if live:
            raise RunDirError(
                f"{', '.join(live)}: runs at the place that the sweep would leave; resume the whole sweep "
                f"(`orchestrate resume {before.name} --cluster ...`), or cancel it first"
            )

    def _renew_code(self, runs: Path, trials: Iterable[TrialEntry]) -> None:
        current = freeze(runs)
        before = [code for trial in trials if (code := renew_code(run_dir_of(runs, trial.id), current)) is not None]
        if before:
            olds = " and ".join(sorted({str(code) for code in before}))
            self.say(
                f"{counted(len(before), 'trial')} will run the code of now ({current}), not that of before ({olds})"
            )


def leaves(before: SweepRecord, now: SweepRecord) -> bool:
    """Tell whether jobs of a sweep have to stop to go on as another cluster file wants it."""
    then, there = before.cluster_config(), now.cluster_config()
    return any(getattr(then, key) != getattr(there, key) for key in _WHAT_A_JOB_HAS)
