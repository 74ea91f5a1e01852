"""`orchestrate resume` with what a person wants otherwise than before."""

import json
from pathlib import Path

from orchestrate.config.run import load_run
from orchestrate.sweep.record import load_record
from tests.cli.commands import RUNS, finished_sweep, orchestrate, parsed, write_cluster, write_data
from tests.launchers.jobs import rank_pids
from tests.sweep.checkpoints import steps_in, write_checkpoint
from tests.sweep.sweeps import bench, record_of, script_all, write_sweep


def test_longer_budget_makes_a_sweep_of_children_that_every_command_knows(place: Path) -> None:
    write_data(place)
    record, _ = finished_sweep(place, {"*": "exit:1"})
    for trial in record.trials:
        write_checkpoint(RUNS / "trials" / trial.id, 6)
    result = orchestrate("resume", "study", "--budget", "2ep", "--once")
    assert result.exit_code == 0, result.output
    assert "study-2ep: 2 trials, 1 at once" in result.stdout
    children = load_record(RUNS, "study-2ep")
    child = children.trials[0].id
    assert steps_in(RUNS / "trials" / child) == [1, 2, 3, 4, 5, 6]
    assert orchestrate("check", str(RUNS / "trials" / child / "run.yaml")).exit_code == 0
    assert [trial["total_steps"] for trial in parsed("status", "study-2ep")["trials"]] == [20, 20]
    told = orchestrate("why", child).stdout
    assert f"continues trial {record.trial_ids[0]} from its checkpoint of step 6" in told
    orchestrate("resume", "study", "--budget", "2ep", "--once")
    assert load_record(RUNS, "study-2ep").trial_ids == children.trial_ids


def test_budget_that_is_spent_already_is_told_with_the_numbers(place: Path) -> None:
    record, _ = finished_sweep(place)
    write_checkpoint(RUNS / "trials" / record.trial_ids[0], 10)
    result = orchestrate("resume", record.trial_ids[0], "--budget", "80img")
    assert result.exit_code == 2
    assert "--budget 80img is 10 steps, 10 are done (1ep); write a longer one" in result.stderr
    assert not (RUNS / "sweeps" / "study-80img").exists()


def test_zero_stage_and_cluster_change_where_and_how_but_not_what(place: Path) -> None:
    write_data(place)
    record, _ = finished_sweep(place, {"*": "exit:1"})
    trial, wide = record.trial_ids[0], place / "wide"
    wide.mkdir()
    words = ("--zero-stage", "1", "--cluster", str(write_cluster(wide, ranks=4)), "--once")
    result = orchestrate("resume", trial, *words)
    assert result.exit_code == 0, result.output
    config = load_run(RUNS / "trials" / trial / "run.yaml")
    assert config.system.zero_stage == 1
    assert config.fingerprint() == trial
    kept = load_record(RUNS, "study")
    assert [entry.config["system"]["zero_stage"] for entry in kept.trials] == [1, 0]
    assert kept.ranks == 4


def test_running_trial_is_moved_to_another_cluster_file(place: Path) -> None:
    write_data(place)
    record = record_of(write_sweep(place, seeds=(0,)))
    script_all(RUNS, record, {"*": "wait"})
    bench(RUNS).session.make_true(record, once=True)
    (trial,) = record.trial_ids
    rank_pids(RUNS, trial)
    wide = place / "wide"
    wide.mkdir()
    result = orchestrate("resume", "study", "--cluster", str(write_cluster(wide, ranks=4)), "--once")
    assert result.exit_code == 0, result.output
    assert "has stopped where it was; its newest checkpoint is of step 1" in result.stdout
    jobs = RUNS / "trials" / trial / "jobs"
    assert json.loads((jobs / "1.end.json").read_text())["exit_code"] == 75
    assert json.loads((jobs / "2.start.json").read_text())["ranks"] == 4


def test_impossible_zero_stage_is_refused_before_anything_changes(place: Path) -> None:
    write_data(place)
    record, _ = finished_sweep(place, {"*": "exit:1"})
    before = load_record(RUNS, "study")
    result = orchestrate("resume", record.trial_ids[0], "--zero-stage", "4")
    assert result.exit_code == 2
    assert load_record(RUNS, "study") == before
