"""What `orchestrate resume` does to trials before they go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrate.errors import RunDirError
from orchestrate.launchers.base import Launcher
from orchestrate.sweep.code import code_of, freeze, renew_code
from orchestrate.sweep.interventions import LONGEST_MOVE_SECONDS, forgive_trials, move_away
from orchestrate.sweep.observe import done_record, observe, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted
from orchestrate.sweep.stopping import doubt

# Sections of a cluster file that a job cannot change once it is submitted.
_WHAT_A_JOB_HAS = ("launcher", "resources", "evaluate", "environment", "slurm")


@dataclass(frozen=True)
class Departure:
    """See to it that no trial has jobs at two places, before sweep.json names the new one.

    Attributes:
        before: the sweep as it was.
        launcher: of the place where it was.
        there: launcher of the place where it will be.
        say: tells a person.
        abandons: whether to give up jobs of which nobody can tell whether they live.
        patience_seconds: that jobs have to stop where they were.
        wait: pauses between looks.
    """

    before: SweepRecord
    launcher: Launcher
    there: Launcher
    say: Callable[[str], None]
    abandons: bool = False
    patience_seconds: float = LONGEST_MOVE_SECONDS
    wait: Callable[[float], None] = time.sleep

    def move(self, runs: Path, trials: Iterable[TrialEntry]) -> None:
        """Stop the jobs of trials where they are, and wait until they have ended; for `orchestrate resume`.

        Raises:
            RunDirError: a job does not stop, or others would stay behind where nobody looks for them.
            TryLaterError: the place does not answer to the request.
        """
        moving = _still_open(runs, trials)
        ids = {trial.id for trial in moving}
        others = [trial for trial in _still_open(runs, self.before.trials) if trial.id not in ids]
        if left := self._busy(runs, others) if moving and not self._same_jobs else []:
            raise RunDirError(
                f"{'; '.join(left)}: at the place that the sweep would leave; resume the whole sweep "
                f"(`orchestrate resume {self.before.name} --cluster ...`), or cancel it first"
            )
        move_away(
            runs,
            moving,
            self.launcher,
            say=self.say,
            abandons=self.abandons,
            patience_seconds=self.patience_seconds,
            wait=self.wait,
        )

    def refuse(self, runs: Path, trials: Iterable[TrialEntry]) -> None:
        """Refuse to start trials at another place that may have jobs where they were; for `orchestrate sweep`.

        Raises:
            RunDirError: one may have.
        """
        all_trials = {trial.id: trial for trial in (*self.before.trials, *trials)}.values()
        if busy := [] if self._same_jobs else self._busy(runs, _still_open(runs, all_trials)):
            raise RunDirError(
                f"{'; '.join(busy)}: under the cluster file of before (launcher: {self.before.cluster['launcher']}); "
                f"to stop what runs there and go on elsewhere: orchestrate resume {self.before.name} --cluster FILE"
            )

    @property
    def _same_jobs(self) -> bool:
        """Whether the new place sees the jobs of the one before: it only has other resources for the next ones."""
        return type(self.launcher) is type(self.there)

    def _busy(self, runs: Path, trials: Collection[TrialEntry]) -> list[str]:
        """Say of trials that have jobs where they were, or may have."""
        seen = observe(runs, [trial.id for trial in trials], self.launcher)
        doubts = {trial.id: doubt(run_dir_of(runs, trial.id), seen[trial.id]) for trial in trials}
        live = [f"{trial.label}: has a job" for trial in trials if seen[trial.id].live_jobs]
        silent = () if self.abandons else [trial for trial in trials if not seen[trial.id].live_jobs]
        return live + [f"{trial.label}: {doubts[trial.id]}" for trial in silent if doubts[trial.id]]


@dataclass(frozen=True)
class Resumption:
    """Let trials go on with the code of now and a fresh set of retries; a `Forgive`.

    Attributes:
        renews_code: whether trials run frozen code.
        diverged_too: whether diverged trials are tried again.
        say: tells a person.
    """

    renews_code: bool
    diverged_too: bool
    say: Callable[[str], None]

    def __call__(self, runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed]) -> list[TrialEntry]:
        """Prepare trials to go on; return those that will be started again."""
        still_open = _still_open(runs, trials)
        if self.renews_code:
            self._renew_code(runs, still_open, observed)
        return forgive_trials(runs, still_open, observed, diverged_too=self.diverged_too)

    def _renew_code(self, runs: Path, trials: Iterable[TrialEntry], observed: Mapping[str, Observed]) -> None:
        begun = {trial.id: code for trial in trials if (code := code_of(run_dir_of(runs, trial.id))) is not None}
        if not begun:
            return
        current = freeze(runs, say=self.say)
        # A job has its code in its script, with which it goes on by itself; code.json must not say otherwise.
        busy = {trial_id for trial_id in begun if observed[trial_id].num_places}
        olds = {trial_id: str(code) for trial_id, code in begun.items() if code.digest != current.digest}
        renewed = olds.keys() - busy
        for trial_id in renewed:
            renew_code(run_dir_of(runs, trial_id), current)
        if renewed:
            before = " and ".join(sorted({olds[trial_id] for trial_id in renewed}))
            self.say(
                f"{counted(len(renewed), 'trial')} will run the code of now ({current}), not that of before ({before})"
            )
        if kept := len(olds.keys() & busy):
            what = (
                "keeps the code of before, as its job runs it"
                if kept == 1
                else "keep the code of before, as jobs run it"
            )
            self.say(f"{counted(kept, 'trial')} {what}; `orchestrate cancel` and then `resume` renews it")


def _still_open(runs: Path, trials: Iterable[TrialEntry]) -> list[TrialEntry]:
    return [trial for trial in trials if done_record(run_dir_of(runs, trial.id)) is None]


def leaves(before: SweepRecord, now: SweepRecord) -> bool:
    """Tell whether jobs of a sweep have to stop to go on as another cluster file wants it."""
    then, there = before.cluster_config(), now.cluster_config()
    return any(getattr(then, key) != getattr(there, key) for key in _WHAT_A_JOB_HAS)
