"""What a sweep would still cost, from what its finished trials did cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrate.launchers.base import Launcher, LaunchPlan, RunSpec
from orchestrate.sweep.batches import advice
from orchestrate.sweep.code import code_of, plan_freeze
from orchestrate.sweep.continuation import first_step
from orchestrate.sweep.observe import done_record, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted
from orchestrate.sweep.standing import State, assess, assess_evaluation
from orchestrate.sweep.status import axis_value


@dataclass(frozen=True)
class Forecast:
    """Steps, images and rank-hours of the trials that are not final.

    Attributes:
        trials, steps, images: still to do; checkpoints count as done.
        rank_hours: predicted, or None without a finished trial to price from.
        basis: how the prediction was made, in words.
    """

    trials: int
    steps: int
    images: int
    rank_hours: float | None
    basis: str


def forecast(record: SweepRecord, runs: Path, observed: Mapping[str, Observed]) -> Forecast:
    """Price what is left of a sweep.

    A trial costs its remaining images times the median rank-seconds per image of the finished trials that have its
    method, backbone and image size. Where there are none, it costs what its `system.images_per_second` says, else the
    median of all finished ones.
    """
    prices = _prices(record, runs)
    left = [trial for trial in record.trials if not assess(observed[trial.id]).state.final]
    begun = {trial.id: _step_reached(trial, observed[trial.id]) for trial in left}
    steps = {trial.id: max(0, trial.total_steps - begun[trial.id]) for trial in left}
    images = {trial.id: steps[trial.id] * int(trial.config["train"]["global_batch"]) for trial in left}
    each = {trial.id: _price_of(trial, prices) for trial in left}
    known = [price for price in each.values() if price is not None]
    hours = None
    if len(known) == len(left) and (left or prices):
        hours = sum(images[key] * price for key, price in each.items() if price is not None) / 3600
    return Forecast(len(left), sum(steps.values()), sum(images.values()), hours, _basis(left, prices, len(known)))


def _price_of(trial: TrialEntry, prices: Mapping[tuple[Any, ...], list[float]]) -> float | None:
    """Return the rank-seconds that an image of a trial costs; None if nothing is known."""
    if measured := prices.get(_kind(trial.config)):
        return median(measured)
    if stated := trial.config["system"].get("images_per_second"):
        return 1 / float(stated)
    return median(price for of_kind in prices.values() for price in of_kind) if prices else None


def _basis(left: Sequence[TrialEntry], prices: Mapping[tuple[Any, ...], list[float]], num_known: int) -> str:
    """Say in words what prices were made of."""
    num_finished = sum(map(len, prices.values()))
    num_stated = sum(
        bool(trial.config["system"].get("images_per_second")) for trial in left if _kind(trial.config) not in prices
    )
    if num_known < len(left):
        others = f", and {num_stated} of {len(left)} state system.images_per_second" if num_stated else ""
        return f"no finished trial to price from{others}"
    if not num_stated:
        return f"measured on {counted(num_finished, 'finished trial')}" if prices else "no finished trial to price from"
    stated = f"by the images_per_second that {counted(num_stated, 'trial')} state{'s' * (num_stated == 1)}"
    return f"{stated}, the others measured" if num_stated < len(left) else stated


def _step_reached(trial: TrialEntry, seen: Observed) -> int:
    return trial.total_steps if seen.trained else max(seen.checkpoint_step, first_step(trial))


def _prices(record: SweepRecord, runs: Path) -> dict[tuple[Any, ...], list[float]]:
    """Return rank-seconds per image of the finished trials, by what mostly decides it."""
    prices: dict[tuple[Any, ...], list[float]] = {}
    for trial in (*record.trials, *record.removed):
        done = done_record(run_dir_of(runs, trial.id)) or {}
        if done.get("rank_seconds") and done.get("images"):
            prices.setdefault(_kind(trial.config), []).append(float(done["rank_seconds"]) / float(done["images"]))
    return prices


def _kind(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return config["method"]["name"], config["backbone"]["name"], config["views"]["size"]


def plan_word(seen: Observed) -> str:
    """Say in a word where a trial is, as far as a plan is concerned."""
    state = assess(seen).state
    words = {State.COMPLETED: "done", State.RUNNING: "running", State.QUEUED: "queued", State.PENDING: "missing"}
    return words.get(state, str(state).lower())


def _launch_plan(
    record: SweepRecord, runs: Path, observed: Mapping[str, Observed], launcher: Launcher
) -> LaunchPlan | None:
    """Plan the first trial that a sweep would start, or the first of all if none is left."""
    if not record.trials:
        return None
    due = [trial for trial in record.trials if assess(observed[trial.id]).next_attempt]
    trial = due[0] if due else record.trials[0]
    seen, stage = observed[trial.id], "pretrain"
    if seen.trained and record.cluster_config().evaluate is not None:
        stage = "evaluate"
    attempt = (assess_evaluation(seen) if stage == "evaluate" else assess(seen)).next_attempt or 1
    run = run_dir_of(runs, trial.id)
    code = (code_of(run) or plan_freeze(runs)).path if record.cluster_config().code == "frozen" else None
    return launcher.plan(RunSpec(trial.id, run.path, attempt, stage=stage, code=code, sweep=record.name))


@dataclass(frozen=True)
class Outlook:
    """What `orchestrate plan` shows.

    Attributes:
        record, observed: what is wanted and what is there.
        left: what it would still cost.
        launch: how the next trial would be started.
        verdict: what the scheduler would say to that; empty where there is none.
        problems: for which the sweep could not be started now.
        warnings: what would make it slow, or was not looked at.
    """

    record: SweepRecord
    observed: Mapping[str, Observed]
    left: Forecast
    launch: LaunchPlan | None
    verdict: str
    problems: Sequence[str]
    warnings: Sequence[str]


def look_ahead(
    record: SweepRecord,
    runs: Path,
    observed: Mapping[str, Observed],
    launcher: Launcher,
    problems: Sequence[str],
    *,
    unseen: Mapping[str, str] = MappingProxyType({}),
) -> Outlook:
    """Work out what a sweep would do, without the datasets that are `unseen` for some reason."""
    left = forecast(record, runs, observed)
    warnings: tuple[str, ...] = ()
    if left.trials:
        due = [trial for trial in record.trials if not assess(observed[trial.id]).state.final]
        warnings = (*launcher.warnings(parallel=min(record.parallel, left.trials)), *advice(record, due))
    launch = _launch_plan(record, runs, observed, launcher)
    verdict = launcher.judge(launch) if launch else ""
    return Outlook(record, observed, left, launch, verdict, problems, (*_unseen_notes(record, unseen), *warnings))


def _unseen_notes(record: SweepRecord, unseen: Mapping[str, str]) -> tuple[str, ...]:
    notes = [f"{url}: not looked at: {reason}" for url, reason in unseen.items()]
    if any(str(digest).startswith("unseen ") for trial in record.trials for digest in _digests(trial)):
        notes.append("ids of trials are others where the datasets can be read, as they cover the datasets' digests")
    return tuple(notes)


def _digests(trial: TrialEntry) -> tuple[str, str]:
    return trial.config["data"]["train_digest"], trial.config["data"]["val_digest"]


def plan_json(outlook: Outlook) -> dict[str, Any]:
    """Return everything that `orchestrate plan` shows, as plain values."""
    record, launch = outlook.record, outlook.launch
    trials = [
        {
            "id": trial.id,
            "assignment": trial.assignment,
            "state": plan_word(outlook.observed[trial.id]),
            "steps": trial.total_steps,
            "images": trial.total_images,
        }
        for trial in record.trials
    ]
    return {
        "sweep": record.name,
        "trials": trials,
        "parallel": record.parallel,
        "left": asdict(outlook.left),
        "launch": json.loads(launch.to_json()) if launch else None,
        "scheduler": outlook.verdict,
        "problems": list(outlook.problems),
        "warnings": list(outlook.warnings),
    }


def plan_view(outlook: Outlook) -> RenderableType:
    """Draw what `orchestrate plan` shows: trials, how one is started, what is left to pay, what is in the way."""
    record, left = outlook.record, outlook.left
    table = Table(box=None, pad_edge=False, header_style="bold")
    axes = list(dict.fromkeys(axis for trial in record.trials for axis in trial.assignment))
    for title in ("trial", *(axis.rpartition(".")[2] for axis in axes), "state"):
        table.add_column(title, no_wrap=True)
    for title in ("steps", "images"):
        table.add_column(title, justify="right", no_wrap=True)
    for trial in record.trials:
        values = [axis_value(trial.assignment.get(axis, "")) for axis in axes]
        sizes = (f"{trial.total_steps:,}", f"{trial.total_images:,}")
        table.add_row(trial.id[:8], *values, plan_word(outlook.observed[trial.id]), *sizes)
    price = left.basis if left.rank_hours is None else f"about {left.rank_hours:.2f} rank-hours, {left.basis}"
    return Group(
        Text(f"{record.name}: {counted(len(record.trials), 'trial')}, at most {record.parallel} at once", style="bold"),
        table,
        Text(f"\nleft: {counted(left.trials, 'trial')}, {left.steps:,} steps, {left.images:,} images; {price}"),
        Text("\nhow a trial is started", style="bold"),
        Text(outlook.launch.render() if outlook.launch else "no trial"),
        *([Text(f"\nthe scheduler says: {outlook.verdict}")] if outlook.verdict else []),
        *(Text(f"warning: {warning}", style="yellow") for warning in outlook.warnings),
        *([Text("\ncannot be started yet", style="bold red")] if outlook.problems else []),
        *(Text(problem) for problem in outlook.problems),
    )
