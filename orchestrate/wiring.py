"""What the commands are made of: results found, launchers built, a sweep run with everything it needs."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer

from orchestrate.errors import ConfigError, OrchestrateError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrate.launchers.base import Launcher
    from orchestrate.sweep.find import Target
    from orchestrate.sweep.hours import Hours
    from orchestrate.sweep.interventions import Forgive
    from orchestrate.sweep.observed import Observed
    from orchestrate.sweep.record import SweepRecord
    from orchestrate.sweep.session import Leave
    from orchestrate.sweep.space import DatasetIdentity

DEFAULT_RUNS = Path("runs")
RUNS_VARIABLE = "ORCHESTRATE_RUNS"
EXIT_NOT_ALL_DONE = 1
EXIT_INTERRUPTED = 130
_PIPE_WIDTH = 1000
_HURRY_SECONDS = 5.0

ResultT = TypeVar("ResultT")


def print_json(values: Mapping[str, Any]) -> None:
    """Print plain values for programs."""
    typer.echo(json.dumps(values, indent=1, default=str))


def console() -> Console:
    """Build the console for people; a pipe gets wide lines instead of cut columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def runs_flag(runs: Path) -> str:
    """Return what a suggested command needs to find the same runs."""
    is_found = runs == DEFAULT_RUNS or RUNS_VARIABLE in os.environ
    return "" if is_found else f" --runs {shlex.quote(str(runs))}"


def launcher_of(record: SweepRecord, runs: Path) -> Launcher:
    """Build the launcher that a sweep uses."""
    from orchestrate.launchers.base import load_launcher

    return load_launcher(record.cluster_config(), runs)


def look(record: SweepRecord, runs: Path) -> tuple[dict[str, Observed], Launcher]:
    """Look at the trials of a sweep; return what was seen, and the launcher that was asked."""
    from orchestrate.sweep.observe import observe

    launcher = launcher_of(record, runs)
    evaluates = record.cluster_config().evaluate is not None
    return observe(runs, record.trial_ids, launcher, evaluates=evaluates), launcher


def hours_of(record: SweepRecord, runs: Path) -> Hours:
    """Add up the hours of all trials that a sweep has or had, if it limits them."""
    from orchestrate.sweep.hours import UNLIMITED, Hours
    from orchestrate.sweep.observed import rank_hours

    allowed = float(record.limits["gpu_hours"])
    if not allowed:
        return UNLIMITED
    observed, launcher = look(record.only(trial.id for trial in (*record.trials, *record.removed)), runs)
    live = sum(seen.num_places for seen in observed.values()) * record.ranks
    return Hours(allowed, rank_hours(observed, time.time()), live=live, next_look_seconds=launcher.poll_seconds)


def replanned(target: Target, runs: Path, *, budget: str, zero_stage: int | None) -> Target:
    """Change what a person wants of trials that exist: a longer budget, another ZeRO stage; neither if not given.

    Raises:
        ConfigError: a trial cannot be trained so.
        RunDirError: a trial has nothing to go on from, or a job works on it.
    """
    from orchestrate.sweep.continuation import at_zero_stage, extended

    def seen(now: Target) -> dict[str, Observed]:
        return look(now.record.only(trial.id for trial in now.trials), runs)[0]

    if budget:
        target = extended(target, budget, runs, seen(target), command=("orchestrate", *sys.argv[1:]))
    return target if zero_stage is None else at_zero_stage(target, zero_stage, seen(target))


def record_of(
    file: Path,
    kind: Literal["sweep", "run"],
    cluster_file: Path,
    runs: Path | None,
    *,
    unseen: dict[str, str] | None = None,
) -> tuple[SweepRecord, Path]:
    """Read what a user asks for, and where its results go.

    Args:
        file: sweep or run file.
        kind: which of both.
        cluster_file: says where.
        runs: folder for the results; None for the cluster's.
        unseen: gets the datasets that cannot be read from here and why, of which the file states the size. Without it
            they are refused.

    Raises:
        ConfigError: every problem of both files, a line each.
    """
    from orchestrate.launchers.cluster import load_cluster
    from orchestrate.sweep.record import build_record
    from orchestrate.sweep.source import load_source

    identity = _asked_once(hurried=unseen is not None)
    source = _attempt(lambda: load_source(file, kind, identity=identity, unseen=unseen))
    cluster = _attempt(lambda: load_cluster(cluster_file))
    if isinstance(cluster, OrchestrateError) or isinstance(source, OrchestrateError):
        problems = [str(result) for result in (source, cluster) if isinstance(result, OrchestrateError)]
        raise ConfigError("\n".join(problems))
    record = build_record(
        source.sweep,
        source.document,
        source.trials,
        cluster=cluster,
        cluster_yaml=cluster_file.read_text(),
        command=("orchestrate", *sys.argv[1:]),
    )
    return record, runs or Path(cluster.paths.runs)


def _asked_once(*, hurried: bool) -> DatasetIdentity:
    """Build a look at datasets that asks for each once, also for those that cannot be read.

    Args:
        hurried: whether to wait seconds for a store that is silent, not minutes, as a person waits for the answer.
    """
    from orchestrate.data.index import dataset_identity
    from orchestrate.data.retry import PATIENCE, Patience

    patience = Patience(budget_seconds=_HURRY_SECONDS) if hurried else PATIENCE
    ask = cache(lambda url: _attempt(lambda: dataset_identity(url, patience=patience)))

    def answer(url: str) -> tuple[str, int, tuple[str, ...]]:
        found = ask(url)
        if isinstance(found, OrchestrateError):
            raise found
        return found

    return answer


def _attempt(make: Callable[[], ResultT]) -> ResultT | OrchestrateError:
    try:
        return make()
    except OrchestrateError as error:
        return error


@dataclass(frozen=True)
class Resume:
    """What `orchestrate resume` was asked for.

    Attributes:
        diverged_too: whether diverged trials are tried again.
        abandons_jobs: whether jobs are given up that nobody can ask about, at the place that the sweep leaves.
    """

    diverged_too: bool
    abandons_jobs: bool = False


def _leaving(
    record: SweepRecord, runs: Path, launcher: Launcher, resume: Resume | None, *, say: Callable[[str], None]
) -> Leave | None:
    """Say what has to be done where a sweep was before; None if it stays there."""
    from orchestrate.sweep.record import find_record
    from orchestrate.sweep.resumption import Departure, leaves

    before = find_record(runs, record.name)
    if before is None or not leaves(before, record):
        return None
    abandons = resume is not None and resume.abandons_jobs
    departure = Departure(before, launcher_of(before, runs), launcher, say=say, abandons=abandons)
    return departure.move if resume else departure.refuse


def _forgiving(record: SweepRecord, resume: Resume, *, say: Callable[[str], None]) -> Forgive:
    """Prepare to take trials up again."""
    from orchestrate.sweep.resumption import Resumption

    renews_code = record.cluster_config().code == "frozen"
    return Resumption(renews_code=renews_code, diverged_too=resume.diverged_too, say=say)


def make_true(
    record: SweepRecord,
    runs: Path,
    *,
    watch: bool,
    once: bool,
    only: Collection[str] = (),
    resume: Resume | None = None,
) -> None:
    """Run a sweep with the launcher, data checks and report of this installation; see `Session.make_true`.

    Args:
        record: what is wanted.
        runs: where results go.
        watch: show a live table.
        once: make a single pass.
        only: ids of the trials to act on; all if empty.
        resume: takes trials up again that a person named.

    Raises:
        typer.Exit: not all trials are done, or the user pressed Ctrl-C.
    """
    from orchestrate.sweep.display import Lines, LiveTable
    from orchestrate.sweep.lease import LeaseHeldError
    from orchestrate.sweep.session import Session
    from orchestrate.sweep.status import status_table, sweep_status

    display = (LiveTable if watch else Lines)(record, runs, console())
    launcher = launcher_of(record, runs)
    session = Session(runs, launcher, display, check_data=check_data, write_report=_write_report)
    leave = _leaving(record, runs, launcher, resume, say=display.line)
    forgive = _forgiving(record, resume, say=display.line) if resume else None
    try:
        with display:
            is_done = session.make_true(record, once=once, only=only, leave=leave, forgive=forgive)
    except LeaseHeldError:
        console().print(status_table(record, sweep_status(record, runs, look(record, runs)[0])))
        raise
    except KeyboardInterrupt:
        flag = runs_flag(runs)
        typer.echo(
            "\nnobody looks any more, but the jobs go on; the same command takes over again\n"
            f"  orchestrate status {record.name}{flag}    shows them\n"
            f"  orchestrate cancel {record.name}{flag}    stops them"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not is_done and not once:
        raise typer.Exit(EXIT_NOT_ALL_DONE)


@cache
def check_data(url: str) -> None:
    """Check once that a dataset is whole; raises DataError if it is not."""
    from orchestrate.data.index import check_shards, load_manifest

    check_shards(url, load_manifest(url))


def checks_but(unseen: Collection[str]) -> Callable[[str], None]:
    """Return a check of datasets that leaves some alone, as they cannot be read from here."""

    def check(url: str) -> None:
        if url not in unseen:
            check_data(url)

    return check


def _write_report(sweep_dir: Path, trials_dir: Path) -> Path:
    from orchestrate.report.page import write_report

    return write_report(sweep_dir, trials_dir, sweep_dir / "report")
