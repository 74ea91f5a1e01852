"""What is checked before the first process starts: everything at once, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrate.checkpoint_files import list_checkpoints, read_manifest
from orchestrate.config.load import suggestion
from orchestrate.config.run import METHODS, PROBES, load_run
from orchestrate.errors import ConfigError, DataError, RunDirError
from orchestrate.launchers.base import Launcher
from orchestrate.sweep.batches import batch_problems
from orchestrate.sweep.continuation import missing_beginning, origin_of, parent_of
from orchestrate.sweep.observe import done_record, run_dir_of
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted
from ssl_methods import plugins

GIGABYTE = 1e9


def check_start(record: SweepRecord, runs: Path, launcher: Launcher, *, check_data: Callable[[str], None]) -> None:
    """Refuse a sweep that could not run, before anything is written or started.

    Raises:
        ConfigError: every problem found, a line each.
    """
    problems = find_problems(record, runs, launcher, check_data=check_data)
    if problems:
        raise ConfigError("\n".join(problems))


def find_problems(
    record: SweepRecord, runs: Path, launcher: Launcher, *, check_data: Callable[[str], None]
) -> list[str]:
    """List everything for which a sweep could not run.

    Args:
        record: what would run.
        runs: where its RunDirs would lie.
        launcher: what would start it.
        check_data: raises DataError if the dataset at a URL is not whole.
    """
    open_trials = [trial for trial in record.trials if done_record(run_dir_of(runs, trial.id)) is None]
    problems = [
        *_place_problems(record, runs, bool(open_trials)),
        *_objective_problems(record),
        *(launcher.problems() if open_trials else ()),
        *(_limit_problems(record) if open_trials else ()),
        *batch_problems(record, open_trials),
        *_run_dir_problems(runs, open_trials),
        *filter(None, (missing_beginning(runs, trial) for trial in open_trials)),
        *_rank_problems(record, runs, open_trials),
        *_data_problems(open_trials, check_data),
    ]
    return list(dict.fromkeys(problems))


def _place_problems(record: SweepRecord, runs: Path, anything_to_do: bool) -> Iterator[str]:
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not existing.is_dir():
        yield f"{runs}: {existing} is not a folder; choose another one with --runs"
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"{runs}: no permission to write in {existing}; choose another folder with --runs"
    least = float(record.cluster["limits"]["min_free_gb"])
    free = shutil.disk_usage(existing).free / GIGABYTE
    if anything_to_do and free < least:
        yield f"{runs}: {free:.1f} GB free, limits.min_free_gb is {least:g}; free some, or use another with --runs"


def _objective_problems(record: SweepRecord) -> Iterator[str]:
    """A misspelt objective would show only when all trials are done."""
    metric = str(record.objective["metric"])
    keys = _probe_keys(record)
    probe, _, number = metric.rpartition(".")
    where = f"{record.file}: objective.metric: {metric!r}"
    names = list(dict.fromkeys(keys.values()))
    fitting = [key for key, name in keys.items() if name == probe]
    unique = [f"{name}.top1" for name in names if list(keys.values()).count(name) == 1]
    if not keys:
        if metric != "loss":  # what a sweep without probes has if it states nothing
            yield f"{where}: no trial has a probe; add one to `probes`, or remove the objective"
    elif not probe or not number:
        yield f"{where}: names no number of a probe; write one of {', '.join(unique or _top1(keys))}"
    elif len(fitting) > 1:
        yield f"{where}: {probe} has several protocols; write one of {', '.join(_top1(fitting))}"
    elif probe not in keys and not fitting:
        yield f"{where}: no such probe; {suggestion(f'{probe}.top1', dict.fromkeys((*unique, *_top1(keys))))}"


def _probe_keys(record: SweepRecord) -> dict[str, str]:
    """Map the key of every probe of the trials to the probe's name."""
    probes = {json.dumps(probe, sort_keys=True): probe for trial in record.trials for probe in trial.config["probes"]}
    return {_probe_key(**probe): probe["name"] for probe in probes.values()}


def _probe_key(*, name: str, **params: Any) -> str:
    plugin: Any = plugins.load(PROBES, name)
    return str(plugin(**params).key)


def _top1(keys: Iterable[str]) -> list[str]:
    return [f"{key}.top1" for key in keys]


def _limit_problems(record: SweepRecord) -> Iterator[str]:
    """No job of such a size would ever be started."""
    cluster = record.cluster_config()
    allowed = cluster.limits.ranks
    for section, resources in (("resources", cluster.resources), ("evaluate", cluster.evaluate)):
        if resources is not None and allowed and resources.ranks > allowed:
            job = f"{section} gives a job {counted(resources.ranks, 'rank')}"
            yield f"cluster: limits.ranks: {allowed}: {job}; raise the limit, or lower {section}.nodes"


def _rank_problems(record: SweepRecord, runs: Path, trials: Iterable[TrialEntry]) -> Iterator[str]:
    """Find trials whose numbers would change with the number of ranks that goes on with them."""
    for trial in trials:
        plugin: Any = plugins.load(METHODS, trial.config["method"]["name"])
        paths = list_checkpoints(run_dir_of(runs, trial.id).checkpoints)
        if parent_of(trial):
            paths.append(origin_of(runs, trial))  # of which a child without checkpoints gets a copy
        manifests = map(read_manifest, paths)
        before = next((manifest["world_size"] for manifest in manifests if manifest), record.ranks)
        if before != record.ranks and plugin.rank_bound and not trial.config["system"].get("elastic"):
            yield (
                f"{trial.label}: saved by {counted(before, 'rank')}, the cluster has {record.ranks}: "
                f"{', '.join(plugin.rank_bound)}; start {counted(before, 'rank')}, or write `system.elastic: true`"
            )


def _run_dir_problems(runs: Path, trials: Iterable[TrialEntry]) -> Iterator[str]:
    for trial in trials:
        run = run_dir_of(runs, trial.id)
        if not run.config_file.exists():
            continue
        try:
            found = load_run(run.config_file).fingerprint()
        except (ConfigError, RunDirError) as error:
            yield f"{run.config_file}: cannot be read; move the folder away to train afresh: {error}"
            continue
        if found != trial.id:
            yield f"{run.config_file}: is the config of trial {found}; move the folder away, or use another with --runs"


def _data_problems(trials: Iterable[TrialEntry], check_data: Callable[[str], None]) -> Iterator[str]:
    urls = {trial.config["data"][split]: None for trial in trials for split in ("train", "val")}
    for url in urls:
        try:
            check_data(url)
        except DataError as error:
            yield str(error)
