from pathlib import Path

import pytest

from orchestrate.errors import RunDirError
from orchestrate.sweep.find import find_sweep, find_target, find_trial
from orchestrate.sweep.record import SweepRecord, TrialEntry, save_record
from tests.sweep.sweeps import record_of, write_sweep


@pytest.fixture
def record(runs: Path, tmp_path: Path) -> SweepRecord:
    found = record_of(write_sweep(tmp_path))
    config = found.trials[0].config
    trials = (TrialEntry("abcdef0123456789", {}, config), TrialEntry("abcd000000000000", {}, config))
    record = found.only([]).following(None)
    record = SweepRecord(**{**vars(record), "trials": trials, "removed": (TrialEntry("0123456789abcdef", {}, config),)})
    save_record(runs, record)
    return record


def test_trial_is_found_by_the_beginning_of_its_id(runs: Path, record: SweepRecord) -> None:
    assert find_trial(runs, "abcde").trials == record.trials[:1]
    assert not find_target(runs, "abcde").whole
    assert find_trial(runs, "0123").trials == record.removed


def test_ambiguous_id_is_answered_with_the_candidates(runs: Path, record: SweepRecord) -> None:
    with pytest.raises(RunDirError, match=r"fits 2 trials(.|\n)*abcdef01(.|\n)*abcd0000"):
        find_trial(runs, "abcd")


def test_id_too_short_to_mean_one_is_not_guessed(runs: Path, record: SweepRecord) -> None:
    with pytest.raises(RunDirError, match="no such sweep or trial"):
        find_trial(runs, "01")


def test_sweep_is_found_by_name_and_by_file(runs: Path, record: SweepRecord) -> None:
    assert find_sweep(runs, "study") == record
    assert find_target(runs, record.file).whole
    with pytest.raises(RunDirError, match="no such sweep"):
        find_sweep(runs, "abcdef")


def test_damaged_record_is_named(runs: Path, record: SweepRecord) -> None:
    (runs / "sweeps" / "study" / "sweep.json").write_text('{"name": "study"}')
    with pytest.raises(RunDirError, match=r"sweep.json: damaged \('trials'\)"):
        find_sweep(runs, "study")
