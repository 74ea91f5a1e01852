"""Find the sweep or the trial that a user means by a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrate.config.load import read_document
from orchestrate.errors import ConfigError, RunDirError
from orchestrate.sweep.record import SweepRecord, TrialEntry, load_record, load_records, sweep_names

SHORTEST_ID = 3


@dataclass(frozen=True)
class Target:
    """What a word means: a sweep with the trials meant, which are all of them or one.

    Attributes:
        record: the sweep; of a trial of several sweeps, the first by name.
        trials: the trials meant.
        whole: whether the word names the sweep.
    """

    record: SweepRecord
    trials: tuple[TrialEntry, ...]
    whole: bool


def find_target(runs: Path, word: str) -> Target:
    """Find a sweep by name or by the path of its file, or a trial by its id or the beginning of it.

    Raises:
        RunDirError: nothing fits, or several trials do; the message lists what there is.
    """
    name = sweep_name(runs, word)
    if name is not None:
        record = load_record(runs, name)
        return Target(record, record.trials, whole=True)
    owners = _owners(load_records(runs), word)
    if not owners:
        raise RunDirError(f"{word}: no such sweep or trial in {runs}; {_known(runs)}")
    ids = sorted({trial.id for _, trial in owners})
    if len(ids) > 1:
        shown = "\n".join(f"  {trial.label}" for trial in {trial.id: trial for _, trial in owners}.values())
        raise RunDirError(f"{word}: fits {len(ids)} trials; write more of the id:\n{shown}")
    record, trial = owners[0]
    return Target(record, (trial,), whole=False)


def find_sweep(runs: Path, word: str) -> SweepRecord:
    """Find a sweep by name or by the path of its file.

    Raises:
        RunDirError: there is no such sweep.
    """
    name = sweep_name(runs, word)
    if name is None:
        raise RunDirError(f"{word}: no such sweep in {runs}; {_known(runs)}")
    return load_record(runs, name)


def find_trial(runs: Path, word: str) -> Target:
    """Find a trial by its id or the beginning of it; the name of a sweep of one trial will do.

    Raises:
        RunDirError: there is no such trial, or the word names several.
    """
    target = find_target(runs, word)
    if len(target.trials) == 1:
        return target
    shown = "\n".join(f"  {trial.label}" for trial in target.trials[:20])
    raise RunDirError(f"{word}: a sweep of {len(target.trials)} trials; name one of them:\n{shown}")


def sweep_name(runs: Path, word: str) -> str | None:
    """Return the name of the sweep that a word means: the name itself, or the path of a sweep file."""
    names = sweep_names(runs)
    if word in names:
        return word
    if word.endswith((".yaml", ".yml")):
        try:
            stated = read_document(Path(word)).data.get("name", Path(word).stem)
        except ConfigError:
            stated = Path(word).stem
        return str(stated) if stated in names else None
    return None


def _owners(records: Sequence[SweepRecord], prefix: str) -> list[tuple[SweepRecord, TrialEntry]]:
    if len(prefix) < SHORTEST_ID:
        return []
    return [
        (record, trial)
        for record in records
        for trial in (*record.trials, *record.removed)
        if trial.id.startswith(prefix)
    ]


def _known(runs: Path) -> str:
    names = sweep_names(runs)
    if not names:
        return "there is no sweep yet; start one with `orchestrate sweep FILE --cluster C`, or say where with --runs"
    return f"sweeps: {', '.join(names)}; trial ids are in `orchestrate status {names[0]}`"
