"""Rebuild the store from what the folders say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrate.errors import StoreError
from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import load_launcher
from orchestrate.store import ENDED, SUBMITTED, AttemptRow, Event, Store
from orchestrate.sweep.causes import cause_of, describe_exit
from orchestrate.sweep.lease import lease_holder
from orchestrate.sweep.observe import observe
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import load_records, record_path, sweep_names
from orchestrate.sweep.standing import assess
from orchestrate.sweep.submission import store_key


def adopt(runs: Path, store: Store) -> tuple[int, int]:
    """Fill a store with every sweep, trial and attempt found in a runs folder; what it held before is replaced.

    Returns:
        Number of sweeps and of trials.

    Raises:
        RunDirError: a sweep.json is damaged.
    """
    records = load_records(runs)
    observed: dict[str, Observed] = {}
    rows: dict[tuple[str, int], AttemptRow] = {}
    for record in records:
        new_ids = [trial_id for trial_id in record.trial_ids if trial_id not in observed]
        place = record.cluster_config()
        evaluates = place.evaluate is not None
        observed |= observe(runs, new_ids, load_launcher(place, runs), evaluates=evaluates)
        for trial_id in new_ids:
            for key, view in _stages(trial_id, observed[trial_id]):
                for attempt in view.attempts:
                    row = AttemptRow(key, attempt.number, record.name, *_end(attempt, view))
                    rows[key, attempt.number] = row
    events = [event for trial_id, seen in observed.items() for event in _all_events(trial_id, seen)]
    sweeps = [(record.name, record.created, record.trial_ids) for record in records]
    store.rebuild(sweeps, rows.values(), sorted(events, key=lambda event: event.time))
    return len(records), len(observed)


def refuse_while_controlled(runs: Path) -> None:
    """Check that no command controls a sweep of these runs, as it would write the store meanwhile.

    Raises:
        StoreError: one does.
    """
    for name in sweep_names(runs):
        holder = lease_holder(record_path(runs, name).parent)
        if holder:
            raise StoreError(f"{name}: {holder} controls this sweep; stop it with Ctrl-C first, its jobs go on")


def _end(attempt: AttemptRecord, seen: Observed) -> tuple[str, float, float | None, int | None]:
    if _is_running(attempt, seen):
        return SUBMITTED, attempt.started, None, None
    return ENDED, attempt.started, attempt.ended, attempt.exit_code


def _is_running(attempt: AttemptRecord, seen: Observed) -> bool:
    return seen.live and seen.job is not None and seen.job.attempt == attempt.number


def _stages(trial_id: str, seen: Observed) -> Iterator[tuple[str, Observed]]:
    """Yield the stages of a trial, each under its name in the store."""
    yield store_key(trial_id, "pretrain"), seen
    if seen.evaluation is not None:
        yield store_key(trial_id, "evaluate"), seen.evaluation


def _all_events(trial_id: str, seen: Observed) -> Iterator[Event]:
    last = 0.0
    for key, view in _stages(trial_id, seen):
        for event in _events(key, view):
            last = max(last, event.time)
            yield event
    place = assess(seen)
    yield Event(last, trial_id, None, str(place.state), str(place.cause) if place.cause else None, place.reason)


def _events(key: str, seen: Observed) -> Iterator[Event]:
    for attempt in seen.attempts:
        yield Event(attempt.started, key, attempt.number, SUBMITTED, None, "found in the RunDir")
        if not _is_running(attempt, seen):
            cause = None if attempt.exit_code == 0 else str(cause_of(attempt))
            yield Event(attempt.ended, key, attempt.number, ENDED, cause, describe_exit(attempt))
