"""Trials that take another trial's checkpoint further: which they are, and the files that they begin with."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orchestrate
from orchestrate.checkpoint_files import find_damage, find_gap, list_checkpoints, name_of, read_manifest
from orchestrate.config.budget import Budget
from orchestrate.config.construction import construction_problems
from orchestrate.config.load import dotted
from orchestrate.config.run import RunConfig, parse_run
from orchestrate.errors import ConfigError, RunDirError
from orchestrate.runs import RunDir, sync_folder, write_json, write_text
from orchestrate.sweep.find import Target
from orchestrate.sweep.observe import run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, TrialEntry, find_record, git_state

LONGEST_NAME = 64


def extended(
    target: Target, budget: str, runs: Path, observed: Mapping[str, Observed], *, command: Sequence[str]
) -> Target:
    """Plan to train trials on to a longer budget: each gets a child that begins from its newest whole checkpoint.

    The children are a sweep of their own, called after the old one and the budget. Asked again, it has the same ones.

    Args:
        target: what a person named.
        budget: the whole length of the children, as in `30ep`.
        runs: folder with `trials/` and `sweeps/`.
        observed: the trials of `target` as they are.
        command: what the person typed.

    Raises:
        ConfigError: the budget is none, or a child's config would be wrong.
        RunDirError: a trial cannot be taken further; every reason, a line each.
    """
    length = _parsed(budget)
    name = f"{target.record.name[: LONGEST_NAME - len(str(length)) - 1]}-{length}"
    before = find_record(runs, name)
    children = _children(before, name)
    problems = []
    for trial in target.trials:
        if trial.id not in children:
            try:
                children[trial.id] = _child(trial, length, runs, observed[trial.id])
            except RunDirError as error:
                problems.append(str(error))
    if problems:
        raise RunDirError("\n".join(problems))
    commit, dirty = git_state(Path(orchestrate.__file__).parent)
    record = replace(
        before or target.record,
        name=name,
        trials=tuple(children.values()),
        removed=(),
        command=tuple(command),
        created=time.time(),
        commit=commit,
        dirty=dirty,
    )
    return Target(record, tuple(children[trial.id] for trial in target.trials), target.whole)


def _parsed(budget: str) -> Budget:
    try:
        length = Budget.parse(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {budget!r}: {error}") from error
    if length.unit not in ("ep", "img", "step"):
        raise ConfigError(f"--budget: {budget!r}: needs a length in ep, img or step, such as 30ep")
    return length


def _children(before: SweepRecord | None, name: str) -> dict[str, TrialEntry]:
    """Return the trials of an earlier command by the trial that each continues."""
    trials = before.trials if before else ()
    children = {parent_of(trial): trial for trial in trials}
    if "" in children:
        raise RunDirError(f"{name}: another sweep has this name; write the budget in another unit, such as img or step")
    return children


def _child(trial: TrialEntry, length: Budget, runs: Path, seen: Observed) -> TrialEntry:
    if seen.live:
        raise RunDirError(f"{trial.label}: a job works on it; let it end, or `orchestrate cancel {trial.id[:8]}`")
    folder = run_dir_of(runs, trial.id).checkpoints
    path = next((path for path in list_checkpoints(folder) if not find_damage(path)), None)
    manifest = read_manifest(path) if path else None
    if manifest is None:
        raise RunDirError(f"{trial.label}: no whole checkpoint in {folder}; resume it without --budget first")
    step, owner = int(manifest["step"]), manifest["fingerprint"]
    if owner != trial.id:
        found = f"has no checkpoint of its own, its newest is step {step:,} of trial {owner}"
        advice = f"resume it without --budget first, or `orchestrate resume {owner[:8]} --budget {length}`"
        raise RunDirError(f"{trial.label}: {found}; {advice}")
    total = _longer_total(trial, length, step, num_samples=int(manifest["order"]["num_samples"]))
    config = _config_of_child(trial, length, step)
    _check_stage(trial, config, step, num_samples=int(manifest["order"]["num_samples"]))
    assignment = {**trial.assignment, "train.budget": str(length)}
    return TrialEntry(config.fingerprint(), assignment, config.model_dump(mode="json"), total)


def _longer_total(trial: TrialEntry, length: Budget, step: int, *, num_samples: int) -> int:
    """Return the steps of a budget, which must be more than are done and than the trial would make by itself."""
    batch, old = int(trial.config["train"]["global_batch"]), trial.config["train"]["budget"]
    total = length.steps(num_samples=num_samples, global_batch=batch)
    if str(length) == old:
        raise RunDirError(f"{trial.label}: {length} is its budget already; resume it without --budget")
    problem = ""
    if total <= step:
        problem = f"{step:,} are done ({step * batch / num_samples:.4g}ep)"
    elif total <= trial.total_steps:
        problem = f"the budget of {old} is {trial.total_steps:,}"
    if problem:
        raise RunDirError(f"{trial.label}: --budget {length} is {total:,} steps, {problem}; write a longer one")
    return total


def _check_stage(trial: TrialEntry, child: RunConfig, step: int, *, num_samples: int) -> None:
    """Refuse a child that would go back to an earlier stage, as parts of a longer budget begin later."""
    size = {"num_samples": num_samples, "global_batch": child.train.global_batch}
    totals = (trial.total_steps, child.train.budget.steps(**size))
    starts = [[start.steps(**size, whole=total) for start in child.train.stages.starts] for total in totals]
    for number, (old, new) in enumerate(zip(*starts, strict=True), start=2):
        if old < step < new:  # where both meet, a checkpoint holds nothing of the later stage yet
            fix = f"train it afresh with a budget of {child.train.budget}"
            found = f"stage {number} began at step {old:,}; of the longer training it would begin at {new:,}"
            raise RunDirError(
                f"{trial.label}: {found}, and {step:,} are done; {fix}, or write train.stages.starts in ep next time"
            )


def _config_of_child(trial: TrialEntry, length: Budget, step: int) -> RunConfig:
    values = copy.deepcopy(trial.config)
    values["train"]["budget"] = str(length)
    values["continues"] = {"trial": trial.id, "step": step}
    return _checked(trial, values)


def _checked(trial: TrialEntry, values: Mapping[str, Any], *, build: bool = False) -> RunConfig:
    config, problems = parse_run(values)
    if config is not None and build:
        problems = construction_problems(config)
    if config is None or problems:
        lines = [f"{trial.label}: {dotted(problem.key)}: {problem.value}: {problem.reason}" for problem in problems]
        raise ConfigError("\n".join(lines))
    return config


def at_zero_stage(target: Target, stage: int, observed: Mapping[str, Observed]) -> Target:
    """Plan to train trials at another ZeRO stage, which is no part of what they are.

    Raises:
        ConfigError: their method, optimizer or engine cannot do it.
        RunDirError: a job works on one of them.
    """
    live = [trial.label for trial in target.trials if trial.id in observed and observed[trial.id].live]
    if live:
        raise RunDirError(f"{', '.join(live)}: a job works on it; let it end, or `orchestrate cancel` it first")
    changed = {trial.id: _at_zero_stage(trial, stage) for trial in target.trials}
    trials = tuple(changed.get(trial.id, trial) for trial in target.record.trials)
    removed = tuple(changed.get(trial.id, trial) for trial in target.record.removed)
    return Target(replace(target.record, trials=trials, removed=removed), tuple(changed.values()), target.whole)


def _at_zero_stage(trial: TrialEntry, stage: int) -> TrialEntry:
    values = copy.deepcopy(trial.config)
    values["system"]["zero_stage"] = stage
    return replace(trial, config=_checked(trial, values, build=True).model_dump(mode="json"))


def parent_of(trial: TrialEntry) -> str:
    """Return the id of the trial that a trial continues; empty if it begins afresh."""
    return str(trial.config.get("continues", {}).get("trial", ""))


def first_step(trial: TrialEntry) -> int:
    """Return the step of the checkpoint that a trial begins from, 0 if it begins afresh."""
    return int(trial.config["continues"]["step"]) if parent_of(trial) else 0


def missing_beginning(runs: Path, trial: TrialEntry) -> str:
    """Say why a trial has nothing to begin from; empty if it has, may have at its URL, or begins afresh."""
    if not _needs_beginning(runs, trial) or trial.config["system"].get("checkpoint_url"):
        return ""
    path, gap = origin_of(runs, trial), _gap_of_origin(runs, trial)
    return f"{trial.label}: continues trial {parent_of(trial)}, but {path}: {gap}" if gap else ""


def _needs_beginning(runs: Path, trial: TrialEntry) -> bool:
    return bool(parent_of(trial)) and not list_checkpoints(run_dir_of(runs, trial.id).checkpoints)


def _gap_of_origin(runs: Path, trial: TrialEntry) -> str:
    path = origin_of(runs, trial)
    owner = (read_manifest(path) or {}).get("fingerprint", parent_of(trial))
    return f"is of trial {owner}" if owner != parent_of(trial) else find_gap(path)


def origin_of(runs: Path, trial: TrialEntry) -> Path:
    """Return the folder of the checkpoint that a child begins from, in the RunDir of its parent."""
    return run_dir_of(runs, parent_of(trial)).checkpoints / name_of(first_step(trial))


def bring_beginning(runs: Path, trial: TrialEntry) -> None:
    """Give a trial the checkpoint that it begins from and the metrics of the steps before, unless it has one already.

    A trial that keeps its checkpoints at a URL as well may do without: the worker looks there.

    Raises:
        RunDirError: the checkpoint is gone.
    """
    if not _needs_beginning(runs, trial):
        return
    problem = missing_beginning(runs, trial)
    if problem:
        raise RunDirError(problem)
    run = run_dir_of(runs, trial.id)
    _copy_metrics(run_dir_of(runs, parent_of(trial)), run, last_step=first_step(trial))
    if not _gap_of_origin(runs, trial):
        _copy_checkpoint(origin_of(runs, trial), run.checkpoints)  # last: it says that all is there


def _copy_metrics(parent: RunDir, child: RunDir, *, last_step: int) -> None:
    """Give a child its parent's metrics, unless it has more: it trained before, and its checkpoints were lost."""
    lines = [line for line in _whole_lines(parent) if json.loads(line)["step"] <= last_step]
    if len(lines) > len(_whole_lines(child)):
        write_text(child.metrics_file, "".join(lines))


def _whole_lines(run: RunDir) -> list[str]:
    """Read the metrics of a trial; the last line of a killed worker may be torn."""
    lines = run.metrics_file.read_text().splitlines(keepends=True) if run.metrics_file.exists() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}\n")]


def _copy_checkpoint(origin: Path, folder: Path) -> None:
    aside = folder / f".tmp-{origin.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in origin.iterdir():
        _link_or_copy(path, aside / path.name)
    sync_folder(aside)
    aside.rename(folder / origin.name)
    sync_folder(folder)
    write_json(folder / "latest.json", {"checkpoint": origin.name})


def _link_or_copy(source: Path, target: Path) -> None:
    """Share the bytes, which never change, or copy them where the file system cannot share."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
