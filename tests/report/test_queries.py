from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrate.errors import RunDirError
from orchestrate.report.csv_files import write_checkpoints
from orchestrate.report.provenance import origins
from orchestrate.report.queries import flatten, load_sweep, metric_names, sample_losses
from orchestrate.runs import RunDir
from tests.report.conftest import METRIC, FakeSweep


def test_done_trial_is_read_from_done_json(sweep: FakeSweep) -> None:
    trial = sweep.add("disco", 128, 20, 3)
    sweep.finish(trial, 0.8)
    sweep.attempt(trial, 2)
    (row,) = sweep.write().trials
    assert (row.method, row.embed_dim, row.budget, row.seed, row.backbone) == ("disco", 128, "20ep", 3, "tiny_resnet")
    assert row.is_done
    assert (row.epochs, row.images, row.train_seconds, row.rank_seconds) == (20.0, 20_000, 40.0, 80.0)
    assert (row.step, row.total_steps, row.num_attempts) == (160, 160, 2)
    assert (row.device, row.world_size) == ("cpu", 2)
    assert row.metrics[METRIC] == 0.8
    assert row.versions["torch"] == "2.14.1"


@pytest.mark.parametrize("state", ["starting", "training", "evaluating", "stopped", "diverged", "failed"])
def test_unfinished_trial_has_the_state_of_its_heartbeat(sweep: FakeSweep, state: str) -> None:
    trial = sweep.add()
    sweep.status(trial, state, step=16, total_steps=80)
    (row,) = sweep.write().trials
    assert (row.state, row.step, row.total_steps, row.metrics) == (state, 16, 80, {})


def test_heartbeat_alone_never_proves_completion(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "done")
    (row,) = sweep.write().trials
    assert row.state == "evaluating"


def test_trial_without_run_dir_is_not_started(sweep: FakeSweep) -> None:
    sweep.add()
    (row,) = sweep.write().trials
    assert (row.state, row.num_attempts, row.train_seconds) == ("not started", 0, None)


def test_trial_with_an_attempt_but_no_heartbeat_is_starting(sweep: FakeSweep) -> None:
    sweep.attempt(sweep.add(), 1)
    (row,) = sweep.write().trials
    assert row.state == "starting"


def test_cancelled_trial_is_cancelled_whatever_its_heartbeat_says(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "training")
    sweep.put(trial, "cancelled.json", {})
    (row,) = sweep.write().trials
    assert row.state == "cancelled"


def test_what_a_trial_spent_is_summed_over_its_attempts(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "training")
    sweep.attempt(trial, 1, seconds=30, world_size=2)
    sweep.attempt(trial, 2, seconds=10, world_size=4)
    (row,) = sweep.write().trials
    assert (row.spent_seconds, row.spent_rank_seconds, row.num_attempts) == (40.0, 100.0, 2)


def test_cost_is_that_of_the_jobs_and_not_only_of_their_workers(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.finish(trial, 0.8)
    sweep.attempt(trial, 1, seconds=30)
    sweep.job(trial, 1, seconds=40)  # ten seconds of imports before the worker's record begins
    sweep.job(trial, 2, seconds=5, exit_code=87)  # died before its worker wrote anything
    (row,) = sweep.write().trials
    assert (row.spent_seconds, row.spent_rank_seconds, row.num_attempts) == (45.0, 90.0, 2)


@pytest.mark.parametrize(
    ("exit_code", "state"),
    [(137, "interrupted"), (86, "interrupted"), (0, "interrupted"), (75, "stopped"), (88, "diverged"), (1, "failed")],
)
def test_heartbeat_of_a_job_that_ended_is_not_believed(sweep: FakeSweep, exit_code: int, state: str) -> None:
    trial = sweep.add()
    sweep.status(trial, "training")
    sweep.attempt(trial, 1)
    sweep.job(trial, 1, seconds=40, exit_code=exit_code)
    (row,) = sweep.write().trials
    assert (row.state, row.step, row.num_attempts) == (state, 16, 1)


def test_job_that_is_gone_without_an_exit_code_was_interrupted(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "training")
    sweep.job(trial, 1)
    (row,) = sweep.write().trials
    assert row.state == "interrupted"


def test_job_that_died_before_its_first_heartbeat_is_no_trial_that_was_not_started(sweep: FakeSweep) -> None:
    sweep.job(sweep.add(), 1, seconds=3, exit_code=2)
    (row,) = sweep.write().trials
    assert (row.state, row.num_attempts, row.spent_rank_seconds) == ("failed", 1, 6.0)


def test_job_on_a_host_that_cannot_be_asked_has_the_state_of_its_heartbeat(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "training")
    sweep.job(trial, 1, host="elsewhere")
    (row,) = sweep.write().trials
    assert row.state == "training"


def test_new_attempt_is_starting_whatever_the_last_one_said(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.status(trial, "stopped", attempt=1)
    sweep.job(trial, 1, seconds=3, exit_code=75)
    sweep.job(trial, 2, host="elsewhere")
    (row,) = sweep.write().trials
    assert row.state == "starting"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results/done.json", '{"finger'),
        ("results/done.json", "[]"),
        ("results/done.json", '{"fingerprint": "another"}'),
        ("status.json", "\x00"),
        ("attempts/1.json", '{"started": "soon", "last_seen": 1, "world_size": 1}'),
    ],
)
def test_damaged_file_makes_the_trial_unreadable_and_not_the_sweep(sweep: FakeSweep, name: str, text: str) -> None:
    damaged, whole = sweep.add(seed=0), sweep.add(seed=1)
    sweep.put_text(damaged, name, text)
    sweep.finish(whole, 0.8)
    first, second = sweep.write().trials
    assert (first.state, bool(first.note)) == ("unreadable", True)
    assert second.is_done


def test_metrics_that_are_not_finite_are_left_out(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.finish(trial, 0.8, metrics={"a.b": float("nan"), "c.d": None, "e.f": 1})
    (row,) = sweep.write().trials
    assert {"a.b", "c.d"}.isdisjoint(row.metrics)
    assert row.metrics["e.f"] == 1.0


def test_missing_sweep_says_how_to_start_one(sweep: FakeSweep) -> None:
    with pytest.raises(RunDirError, match=r"sweep\.json: no such file; start the sweep first"):
        load_sweep(sweep.sweep_dir, sweep.trials_dir)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"objective": {"metric": "a.b"}, "trials": []}'])
def test_damaged_sweep_is_named(sweep: FakeSweep, text: str) -> None:
    sweep.sweep_dir.mkdir(parents=True)
    (sweep.sweep_dir / "sweep.json").write_text(text)
    with pytest.raises(RunDirError, match=r"sweep\.json: not a sweep"):
        load_sweep(sweep.sweep_dir, sweep.trials_dir)


def test_objective_comes_first_among_the_metrics_and_baselines_are_none(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.finish(trial, 0.8, metrics={"a.top1": 0.1, "random_init/a.top1": 0.1})
    written = sweep.write()
    assert metric_names(written.trials, written.objective) == (METRIC, "a.top1")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("knn.top1", METRIC),
        ("knn_k20.top1", METRIC),
        (METRIC, METRIC),
        ("linear.top1", "linear.top1"),
        ("knn.top5", "knn.top5"),
        ("loss", "loss"),
    ],
)
def test_objective_may_name_the_probe_without_its_protocol(sweep: FakeSweep, asked: str, found: str) -> None:
    sweep.fields = {"objective": {"metric": asked, "goal": "max"}}
    sweep.finish(sweep.add(), 0.8)
    assert sweep.write().objective.metric == found


def test_objective_of_two_protocols_stays_ambiguous(sweep: FakeSweep) -> None:
    sweep.fields = {"objective": {"metric": "knn.top1"}}
    sweep.finish(sweep.add(), 0.8, metrics={"knn_k200_cosine.top1": 0.7})
    assert sweep.write().objective.metric == "knn.top1"


def test_steps_of_a_trial_that_was_not_started_come_from_the_sweep(sweep: FakeSweep) -> None:
    sweep.add()
    sweep.trials[0]["total_steps"] = 800
    (row,) = sweep.write().trials
    assert (row.step, row.total_steps) == (None, 800)


def test_flatten_joins_nested_keys_with_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2], "e.f": 3}) == {"a.b.c": 1, "d": [2], "e.f": 3}


def test_losses_of_a_short_run_are_read_whole_and_sorted(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.losses(trial, [4.0, 3.0, 2.0], steps_per_epoch=2)
    assert sample_losses(RunDir(sweep.trials_dir / trial)) == ((0.5, 4.0), (1.0, 3.0), (1.5, 2.0))


def test_losses_of_a_long_run_are_sampled_evenly(sweep: FakeSweep) -> None:
    trial = sweep.add()
    sweep.losses(trial, [float(step) for step in range(1, 5001)], steps_per_epoch=1)
    found = sample_losses(RunDir(sweep.trials_dir / trial), max_points=50)
    steps = [epoch for epoch, _ in found]
    assert len(found) == 50
    assert steps[0] == 1
    # 5000 lines in 50 equal parts of bytes: about 100 lines each, more at the start, where numbers are shorter.
    assert all(90 <= after - before <= 130 for before, after in pairwise(steps))


def test_half_written_and_nonfinite_losses_are_left_out(sweep: FakeSweep) -> None:
    trial = sweep.add()
    whole = json.dumps({"step": 1, "epoch": 0.5, "loss": 4.0})
    sweep.put_text(trial, "metrics.jsonl", f'{whole}\n{{"step": 2, "epoch": 1.0, "loss": NaN}}\n{{"step": 3, "ep')
    assert sample_losses(RunDir(sweep.trials_dir / trial)) == ((0.5, 4.0),)


def test_no_losses_without_a_file(sweep: FakeSweep) -> None:
    assert sample_losses(RunDir(sweep.trials_dir / "none")) == ()


def test_checkpoints_that_were_scored_and_the_commit_that_ran_are_read(sweep: FakeSweep) -> None:
    trial = sweep.add("barlow_twins", 64, 2, 0)
    sweep.finish(trial, 0.8)
    for step in (16, 8):
        record = {"step": step, "images": 125 * step, "epochs": step / 8, "metrics": {METRIC: 0.01 * step}}
        sweep.put(trial, f"results/step-{step:08d}/done.json", record)
    sweep.put_text(trial, "results/step-00000024/done.json", "{")
    sweep.put(trial, "code.json", {"digest": "0123456789ab", "commit": "fedcba", "dirty": True})
    read = sweep.write()
    (row,) = read.trials
    assert [(point.step, point.epochs, point.metrics) for point in row.checkpoints] == [
        (8, 1.0, {METRIC: 0.08}),
        (16, 2.0, {METRIC: 0.16}),
    ]
    assert dict(origins(read))["commit"] == "fedcba, with changes that were not committed"


def test_scores_of_checkpoints_are_a_table_of_their_own(sweep: FakeSweep, tmp_path: Path) -> None:
    trial = sweep.add("barlow_twins", 64, 2, 0)
    record = {"step": 8, "images": 1000, "epochs": 1.0, "metrics": {METRIC: 0.5}}
    write_checkpoints(tmp_path / "checkpoints.csv", sweep.write())
    assert not (tmp_path / "checkpoints.csv").exists()
    sweep.put(trial, "results/step-00000008/done.json", record)
    write_checkpoints(tmp_path / "checkpoints.csv", sweep.write())
    header, row = (tmp_path / "checkpoints.csv").read_text().splitlines()
    assert header == f"trial,method.name,method.embed_dim,train.budget,train.seed,step,images,epochs,{METRIC}"
    assert row == f"{trial},barlow_twins,64,2ep,0,8,1000,1.0,0.5"
