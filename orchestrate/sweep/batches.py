"""What the methods of a sweep say of their batches on the ranks of a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from orchestrate.config.construction import batch_advice, batch_refusal
from orchestrate.config.run import RunConfig, parse_run
from orchestrate.sweep.record import SweepRecord, TrialEntry, counted


def batch_problems(record: SweepRecord, trials: Iterable[TrialEntry]) -> Iterator[str]:
    """Find global batches that do not divide by the ranks, and those that a method cannot take on so many ranks."""
    trials, ranks = list(trials), record.ranks
    for batch in sorted({int(trial.config["train"]["global_batch"]) for trial in trials}):
        if batch % ranks:
            fits = ", ".join(str(number) for number in (batch - batch % ranks, batch + ranks - batch % ranks) if number)
            yield (
                f"{record.file}: train.global_batch: {batch}: does not divide by the {ranks} ranks of the cluster; "
                f"write {fits}, or change resources.ranks_per_node"
            )
    for config in _kinds(trials):
        dividing = config.train.global_batch % ranks == 0
        if dividing and (reason := batch_refusal(config, num_ranks=ranks)):
            yield f"{record.file}: method: {config.method.name}: on {counted(ranks, 'rank')}: {reason}"


def advice(record: SweepRecord, trials: Iterable[TrialEntry]) -> tuple[str, ...]:
    """Return what methods advise, each line once."""
    found = (
        f"{config.method.name}: {line}"
        for config in _kinds(trials)
        for line in batch_advice(config, num_ranks=record.ranks)
    )
    return tuple(dict.fromkeys(found))


def _kinds(trials: Iterable[TrialEntry]) -> Iterator[RunConfig]:
    """Yield a config for each combination of what batches depend on: a sweep of thousands has few."""
    kinds: dict[str, dict[str, Any]] = {}
    for trial in trials:
        config = trial.config
        kind = [config["backbone"], config["method"], config["views"], config["train"]["global_batch"]]
        kinds.setdefault(json.dumps(kind, sort_keys=True), config)
    for values in kinds.values():
        parsed, _ = parse_run(values)
        if parsed is not None:  # of an older version; what cannot be read any more is told elsewhere
            yield parsed
