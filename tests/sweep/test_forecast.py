import os
from pathlib import Path

import pytest

from orchestrate.sweep.forecast import forecast, look_ahead, plan_json
from orchestrate.sweep.observe import observe
from tests.sweep.sweeps import bench, record_of, write_sweep


def test_rest_of_a_sweep_is_priced_by_its_finished_trials(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    made.session.make_true(record_of(write_sweep(tmp_path, seeds=(0, 1))))
    record = record_of(write_sweep(tmp_path, seeds=(0, 1, 2, 3, 4)))
    left = forecast(record, runs, observe(runs, record.trial_ids, made.launcher))
    assert (left.trials, left.steps, left.images) == (3, 30, 240)
    # The stand-in claims 1.6 rank-seconds for 80 images.
    assert left.rank_hours == pytest.approx(3 * 1.6 / 3600)
    assert left.basis == "measured on 2 finished trials"


def test_nothing_is_guessed_without_a_measurement(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    left = forecast(record, runs, observe(runs, record.trial_ids, bench(runs).launcher))
    assert left.rank_hours is None


def stated_speed(path: Path, speed: str) -> Path:
    path.write_text(path.read_text().replace("system: {", f"system: {{images_per_second: {speed}, "))
    return path


def test_stated_speed_prices_what_nothing_was_measured_of(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(stated_speed(write_sweep(tmp_path), "40.0"))
    left = forecast(record, runs, observe(runs, record.trial_ids, made.launcher))
    assert left.rank_hours == pytest.approx(2 * 80 / 40 / 3600)
    assert left.basis == "by the images_per_second that 2 trials state"
    made.session.make_true(record_of(write_sweep(tmp_path, seeds=(0,))))
    record = record_of(stated_speed(write_sweep(tmp_path, seeds=(0, 1)), "40.0"))
    left = forecast(record, runs, observe(runs, record.trial_ids, made.launcher))
    assert left.rank_hours == pytest.approx(1.6 / 3600)  # what was measured counts more
    assert left.basis == "measured on 1 finished trial"


def test_price_that_some_trials_lack_is_not_made_up(runs: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    path.write_text(path.read_text().replace("train.seed: [0, 1]", "system.images_per_second: [0.0, 9.0]"))
    path.write_text(path.read_text().replace("system.images_per_second", "train.seed, system.images_per_second"))
    path.write_text(path.read_text().replace("[0.0, 9.0]", "[[0, 0.0], [1, 9.0]]"))
    record = record_of(path)
    left = forecast(record, runs, observe(runs, record.trial_ids, bench(runs).launcher))
    assert left.rank_hours is None
    assert left.basis == "no finished trial to price from, and 1 of 2 state system.images_per_second"


def test_checkpoints_count_as_done(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    (runs / "trials" / record.trial_ids[0] / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert forecast(record, runs, observe(runs, record.trial_ids, bench(runs).launcher)).steps == 3


def test_plan_shows_the_launch_of_the_first_trial_that_is_due(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    made.session.make_true(record_of(write_sweep(tmp_path, seeds=(0,))))
    record = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    outlook = look_ahead(record, runs, observe(runs, record.trial_ids, made.launcher), made.launcher, ["a problem"])
    values = plan_json(outlook)
    assert [trial["state"] for trial in values["trials"]] == ["done", "missing"]
    assert values["launch"]["name"] == f"oc-{record.trial_ids[1]}"
    assert values["problems"] == ["a problem"]


def test_plan_warns_of_more_ranks_than_cores_while_anything_is_left(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    outlook = look_ahead(record, runs, observe(runs, record.trial_ids, made.launcher), made.launcher, [])
    (warning,) = plan_json(outlook)["warnings"]
    assert "they will slow each other down" in warning
    made.session.make_true(record)
    done = look_ahead(record, runs, observe(runs, record.trial_ids, made.launcher), made.launcher, [])
    assert plan_json(done)["warnings"] == []
