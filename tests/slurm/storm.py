"""A sweep whose trials are hit by faults, each by several in turn, all trials at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from orchestrate.sweep.causes import Cause
from tests.slurm.cluster import PATIENCE_SECONDS
from tests.slurm.faults import Fault
from tests.slurm.pace import crawl_file
from tests.slurm.studies import Controller, Study, Trial

# Two checkpoints lie five steps apart: some steps are lost, some are kept.
STEPS_BEFORE = 4


@dataclass(frozen=True)
class Case:
    """A fault, and what the end of the attempt that it hits must be called."""

    name: str
    fault: Fault
    cause: Cause


# What was done, to the attempt of which number.
Hits = list[tuple[Case, int]]


class Storm:
    """A sweep under faults: the next one hits a trial as soon as the attempt after the last one trains.

    A trial crawls (see `tests.slurm.pace`) until it has had its last one.

    Args:
        study: not started yet.
        plan: the faults of each trial.
        steps: steps that an attempt takes before it is hit.
        patience: seconds that a trial may wait for its turn.
    """

    def __init__(
        self,
        study: Study,
        plan: Sequence[Sequence[Case]],
        *,
        steps: Callable[[], int] = lambda: STEPS_BEFORE,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.study = study
        self._steps, self._patience = steps, patience
        for trial in study.trials:
            trial.run.path.mkdir(parents=True)
            crawl_file(trial.run.path).touch()
        self.controller: Controller = study.start()
        self._pool = ThreadPoolExecutor(len(plan))
        self._hits: list[Future[Hits]] = [
            self._pool.submit(self._hit, trial, cases) for trial, cases in zip(study.trials, plan, strict=True)
        ]

    def _hit(self, trial: Trial, cases: Sequence[Case]) -> Hits:
        hits: Hits = []
        for case in cases:
            after = hits[-1][1] if hits else 0
            attempt = trial.wait_for_training(after=after, steps=self._steps(), patience=self._patience)
            hits.append((case, attempt.number))
            case.fault(trial, attempt)
        crawl_file(trial.run.path).unlink()
        return hits

    def outcome(self, index: int) -> tuple[Trial, Hits]:
        """Wait until a trial is complete; return it and the attempts that were hit."""
        trial = self.study.trials[index]
        try:
            hits = self._hits[index].result()
            trial.wait_until_done(self._patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.controller.said}{trial.story()}") from error
        return trial, hits

    def end(self) -> None:
        """End the sweep, whatever became of it."""
        self.controller.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
