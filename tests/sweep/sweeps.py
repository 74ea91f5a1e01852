"""Sweeps of stand-in jobs."""

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from orchestrate.launchers.base import LaunchPlan
from orchestrate.launchers.local import LocalLauncher
from orchestrate.store import store_path
from orchestrate.sweep.controller import Pass
from orchestrate.sweep.record import SweepRecord, TrialEntry, build_record
from orchestrate.sweep.session import Session
from orchestrate.sweep.source import load_source
from orchestrate.sweep.standing import Standing
from tests.launchers.jobs import STAND_IN, cluster, trial_dir

NUM_SAMPLES = 80  # with a batch of 8: ten steps an epoch

SWEEP = """
name: {name}
base:
  data: {{train: {data}/train, val: {data}/val}}
  method: {{name: simclr, embed_dim: 16}}
  backbone: {{name: tiny_resnet}}
  views: {{name: small_grey, size: 28}}
  optim: {{name: adamw, lr: 0.001}}
  train: {{global_batch: {batch}, budget: 1ep}}
  probes: [{{name: knn, k: 20}}]
  system: {{workers: {workers}}}
space:
  train.seed: {seeds}
objective: {{metric: knn.top1}}
limits: {{gpu_hours: {gpu_hours}}}
"""


def identity(url: str) -> tuple[str, int, tuple[str, ...]]:
    return ("ab" * 32, NUM_SAMPLES, tuple("abcdefghij"))


def write_sweep(
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    name: str = "study",
    batch: int = 8,
    workers: int = 1,
    gpu_hours: float = 0.0,
) -> Path:
    path = folder / f"{name}.yaml"
    text = SWEEP.format(
        name=name, data=folder / "data", batch=batch, workers=workers, seeds=list(seeds), gpu_hours=gpu_hours
    )
    path.write_text(text)
    return path


def record_of(path: Path, *, parallel: int = 1, ranks: int = 2) -> SweepRecord:
    source = load_source(path, "sweep", identity=identity)
    place = cluster(parallel=parallel, ranks=ranks)
    return build_record(
        source.sweep, source.document, source.trials, cluster=place, cluster_yaml="", command=("orchestrate", "sweep")
    )


def script_all(runs: Path, record: SweepRecord, *script: dict[str, str]) -> None:
    """Let the jobs of every trial do the same."""
    for trial in record.trials:
        trial_dir(runs, trial.id, *script)


def store_rows(runs: Path) -> list[tuple[object, ...]]:
    """Read what the store says of trials and their attempts, without the times and names that only a submission has."""
    queries = (
        "SELECT id, state, cause, reason FROM trials ORDER BY id",
        "SELECT trial, number, sweep, state, ended, exit_code FROM attempts ORDER BY trial, number",
    )
    with closing(sqlite3.connect(store_path(runs))) as connection:
        return [row for query in queries for row in connection.execute(query)]


@dataclass
class Memory:
    """A display that remembers."""

    lines: list[str] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)
    each: Callable[[Pass], None] = lambda current: None

    def line(self, text: str) -> None:
        self.lines.append(text)

    def changed(self, trial: TrialEntry, place: Standing) -> None:
        self.changes.append((trial.id, str(place.state)))

    def looked(self, current: Pass) -> None:
        self.each(current)


class CountingLauncher(LocalLauncher):
    """The local launcher, with a list of what it submitted."""

    def __init__(self, runs: Path, *, ranks: int = 2) -> None:
        super().__init__(cluster(ranks=ranks), runs, worker=STAND_IN)
        self.submitted: list[str] = []

    def submit(self, plan: LaunchPlan) -> str:
        self.submitted.append(f"{plan.name.removeprefix('oc-')}.{plan.attempt}")
        return super().submit(plan)


@dataclass
class Bench:
    """A session with everything in reach of a test."""

    runs: Path
    launcher: CountingLauncher
    display: Memory
    reports: list[Path]
    session: Session


def bench(runs: Path) -> Bench:
    launcher, display, reports = CountingLauncher(runs), Memory(), list[Path]()

    def write_report(sweep_dir: Path, trials_dir: Path) -> Path:
        page = sweep_dir / "report" / "index.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text("report")
        reports.append(page)
        return page

    session = Session(
        runs,
        launcher,
        display,
        check_data=lambda url: None,
        write_report=write_report,
        wait=lambda seconds: time.sleep(0.01),
    )
    return Bench(runs, launcher, display, reports, session)
