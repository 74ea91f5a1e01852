"""Submit attempts so that a crash at any moment, or an answer that is lost, leaves a trace and starts nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from orchestrate.config.load import dump_yaml
from orchestrate.errors import LaunchError
from orchestrate.launchers.base import JobExistsError, Launcher, LaunchPlan, RunSpec, TryLaterError, job_name
from orchestrate.runs import RunDir, create_run_dir, write_text
from orchestrate.store import Store
from orchestrate.sweep.code import FrozenCode, code_for, code_of, freeze
from orchestrate.sweep.continuation import bring_beginning
from orchestrate.sweep.observe import run_dir_of
from orchestrate.sweep.plan import Submit
from orchestrate.sweep.record import SweepRecord, TrialEntry


def store_key(trial_id: str, stage: str) -> str:
    """Return the name under which the store keeps the attempts of a stage of a trial."""
    return job_name(trial_id, stage).removeprefix(job_name(""))


@dataclass(frozen=True)
class Submitted:
    """What came of some submissions.

    Attributes:
        num_started: attempts that the launcher took.
        refusal: why the others have to wait, if the place does not answer or is full.
    """

    num_started: int
    refusal: TryLaterError | None = None


class Submitter:
    """Prepare RunDirs, store what is intended, and hand attempts to the launcher.

    Args:
        record: what is wanted.
        runs: folder with `trials/` and `sweeps/`.
        launcher: starts jobs.
        store: where intents go.
        clock: unix time.
        say: called with what a new copy of the code lacks.
    """

    def __init__(
        self,
        record: SweepRecord,
        runs: Path,
        launcher: Launcher,
        store: Store,
        *,
        clock: Callable[[], float],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._record, self._runs, self._launcher, self._store = record, runs, launcher, store
        self._clock, self._say, self._cluster = clock, say, record.cluster_config()
        self._trials: Mapping[str, TrialEntry] = {trial.id: trial for trial in record.trials}
        self._code: FrozenCode | None = None
        self._has_fixed_code = False

    def start(self, submits: Sequence[Submit]) -> Submitted:
        """Submit attempts in order, as far as the place takes them.

        Raises:
            LaunchError: one was refused for good.
        """
        num_started = 0
        for batch in self._batches(submits):
            try:
                num_started += self._start(batch)
            except TryLaterError as refusal:
                return Submitted(num_started, refusal)
        return Submitted(num_started)

    def _start(self, batch: Sequence[Submit]) -> int:
        plans = [self._prepare(submit) for submit in batch]
        try:
            jobs = [self._launcher.submit(plans[0])] if len(plans) == 1 else self._launcher.submit_array(plans)
        except JobExistsError as error:
            self._refuse(batch, error)  # another controller was faster; the next pass sees its job
            return 0
        except TryLaterError as error:
            if error.full:
                self._refuse(batch, error)  # else the answer may be lost and the job be there: the intent stays
            raise
        except LaunchError as error:
            self._refuse(batch, error)
            raise
        for submit, job in zip(batch, jobs, strict=True):
            key = store_key(submit.trial_id, submit.stage)
            self._store.submitted(key, submit.attempt, job, sweep=self._record.name, now=self._clock())
        return len(jobs)

    def _prepare(self, submit: Submit) -> LaunchPlan:
        trial = self._trials[submit.trial_id]
        run = run_dir_of(self._runs, trial.id)
        prepare_run_dir(self._runs, trial, stage=submit.stage)
        key, now = store_key(trial.id, submit.stage), self._clock()
        self._store.intend(key, submit.attempt, sweep=self._record.name, now=now, reason=submit.reason)
        spec = RunSpec(
            trial.id,
            run.path,
            submit.attempt,
            stage=submit.stage,
            exclude=submit.exclude,
            code=self._code_of(run),
            sweep=self._record.name,
        )
        return self._launcher.plan(spec)

    def _batches(self, submits: Sequence[Submit]) -> Iterator[Sequence[Submit]]:
        """Split submissions into those of one request each: jobs of a single rank go together where arrays are."""
        size = self._launcher.array_size
        for stage, group in groupby(submits, key=lambda submit: submit.stage):
            together = size if size > 1 and self._cluster.stage_resources(stage).ranks == 1 else 1
            yield from _chunks(list(group), together)

    def fix_code(self, trial_ids: Iterable[str]) -> None:
        """Fix the code of trials that will have to run: that of the first call, not of when the turn of each comes."""
        if self._cluster.code != "frozen" or self._has_fixed_code:
            return
        self._has_fixed_code = True
        if any(code_of(run_dir_of(self._runs, trial_id)) is None for trial_id in trial_ids):
            self._freeze()

    def _code_of(self, run: RunDir) -> Path | None:
        """Return the copy that the next attempt of a trial runs; None if it runs what is in the checkout then."""
        if self._cluster.code != "frozen":
            return None
        return (code_of(run) or code_for(run, self._freeze())).path

    def _freeze(self) -> FrozenCode:
        self._code = self._code or freeze(self._runs, say=self._say)
        return self._code

    def _refuse(self, batch: Sequence[Submit], error: LaunchError) -> None:
        for submit in batch:
            key = store_key(submit.trial_id, submit.stage)
            self._store.refused(key, submit.attempt, sweep=self._record.name, now=self._clock(), reason=str(error))


def _chunks(submits: Sequence[Submit], size: int) -> Iterator[Sequence[Submit]]:
    return (submits[start : start + size] for start in range(0, len(submits), size))


def prepare_run_dir(runs: Path, trial: TrialEntry, *, stage: str = "pretrain") -> None:
    """Make the RunDir of a trial with what it begins from, or bring what is no identity in its run.yaml up to date.

    Raises:
        RunDirError: the folder cannot be written, or what the trial continues is gone.
    """
    text = dump_yaml(trial.config)
    run = create_run_dir(run_dir_of(runs, trial.id).path, text)
    if run.config_file.read_text() != text:
        write_text(run.config_file, text)  # other workers, engine or data URLs; the numbers are the same
    if stage == "evaluate":
        run.evaluation.stop_file.unlink(missing_ok=True)
        return
    run.stop_file.unlink(missing_ok=True)
    bring_beginning(runs, trial)
