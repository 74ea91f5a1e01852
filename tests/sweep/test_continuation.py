"""Trials taken further than they were planned, and trained otherwise."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.checkpoint_files import find_damage, list_checkpoints
from orchestrate.config.run import load_run
from orchestrate.errors import ConfigError, RunDirError
from orchestrate.sweep.continuation import at_zero_stage, bring_beginning, extended, missing_beginning
from orchestrate.sweep.find import Target
from orchestrate.sweep.observe import observe, run_dir_of
from orchestrate.sweep.preflight import find_problems
from orchestrate.sweep.record import SweepRecord, TrialEntry, load_record, save_record
from orchestrate.sweep.submission import prepare_run_dir
from orchestrate.sweep.why import explain
from tests.launchers.jobs import rank_pids
from tests.sweep.checkpoints import steps_in, write_checkpoint
from tests.sweep.sweeps import bench, record_of, script_all, write_sweep


@pytest.fixture
def record(runs: Path, tmp_path: Path) -> SweepRecord:
    """A sweep of two trials of ten steps, an epoch each."""
    found = record_of(write_sweep(tmp_path))
    save_record(runs, found)
    return found


def extend(runs: Path, record: SweepRecord, budget: str, trials: Sequence[TrialEntry] = ()) -> Target:
    target = Target(record, tuple(trials) or record.trials, whole=not trials)
    observed = observe(runs, [trial.id for trial in target.trials], bench(runs).launcher)
    return extended(target, budget, runs, observed, command=("orchestrate", "resume"))


def test_child_is_another_trial_that_says_where_it_comes_from(runs: Path, record: SweepRecord) -> None:
    parent = record.trials[0]
    write_checkpoint(runs / "trials" / parent.id, 10)
    target = extend(runs, record, "3ep", [parent])
    (child,) = target.trials
    assert target.record.name == "study-3ep"
    assert child.id not in record.trial_ids
    assert child.total_steps == 30
    assert child.assignment == {"train.seed": 0, "train.budget": "3ep"}
    assert child.config["continues"] == {"trial": parent.id, "step": 10}
    expected = {**parent.config, "continues": child.config["continues"]}
    assert child.config == {**expected, "train": {**parent.config["train"], "budget": "3ep"}}


def test_child_begins_from_the_newest_whole_checkpoint_and_its_metrics(runs: Path, record: SweepRecord) -> None:
    parent = record.trials[0]
    folder = runs / "trials" / parent.id
    kept = write_checkpoint(folder, 4)
    damaged = write_checkpoint(folder, 8)
    (damaged / "model.safetensors").write_bytes(b"weights of step 9")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a killed worker
    (child,) = extend(runs, record, "2ep", [parent]).trials
    prepare_run_dir(runs, child)
    run = run_dir_of(runs, child.id)
    assert load_run(run.config_file).fingerprint() == child.id
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["latest.json", "step-00000004"]
    assert find_damage(run.checkpoints / "step-00000004") == ""
    assert (run.checkpoints / "step-00000004" / "model.safetensors").samefile(kept / "model.safetensors")
    assert steps_in(run.path) == [1, 2, 3, 4]


def test_child_that_trains_already_is_left_alone(runs: Path, record: SweepRecord) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 10)
    (child,) = extend(runs, record, "2ep", record.trials[:1]).trials
    prepare_run_dir(runs, child)
    run = run_dir_of(runs, child.id)
    write_checkpoint(run.path, 12)
    (run.checkpoints / "step-00000010" / "manifest.json").unlink()
    bring_beginning(runs, child)
    assert steps_in(run.path) == list(range(1, 13))
    assert not (run.checkpoints / "step-00000010" / "manifest.json").exists()


def test_interrupted_copy_is_made_again(runs: Path, record: SweepRecord) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 10)
    (child,) = extend(runs, record, "2ep", record.trials[:1]).trials
    half = run_dir_of(runs, child.id).checkpoints / ".tmp-step-00000010"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    prepare_run_dir(runs, child)
    assert find_damage(run_dir_of(runs, child.id).checkpoints / "step-00000010") == ""
    assert not half.exists()


def test_same_command_finds_the_same_child_although_its_parent_went_on(runs: Path, record: SweepRecord) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    first = extend(runs, record, "2ep", record.trials[:1])
    save_record(runs, first.record)
    write_checkpoint(runs / "trials" / record.trials[0].id, 8)
    assert extend(runs, record, "2ep", record.trials[:1]).trials == first.trials


def test_children_of_one_sweep_and_budget_gather_in_one_sweep(runs: Path, record: SweepRecord) -> None:
    children: tuple[TrialEntry, ...] = ()
    for trial in record.trials:
        write_checkpoint(runs / "trials" / trial.id, 10)
        target = extend(runs, record, "2ep", [trial])
        save_record(runs, target.record)
        children += target.trials
    assert load_record(runs, "study-2ep").trials == children
    assert extend(runs, record, "2ep").trials == children


def test_budget_that_is_not_longer_than_what_is_done_is_told_with_the_numbers(runs: Path, record: SweepRecord) -> None:
    for trial in record.trials:
        write_checkpoint(runs / "trials" / trial.id, 10)
    with pytest.raises(RunDirError) as error:
        extend(runs, record, "8step")
    for trial in record.trials:
        assert f"{trial.label}: --budget 8step is 8 steps, 10 are done (1ep); write a longer one" in str(error.value)
    with pytest.raises(RunDirError, match="1ep is its budget already; resume it without --budget"):
        extend(runs, record, "1.0ep")


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("8step", "--budget 8step is 8 steps, the budget of 1ep is 10; write a longer one"),
        ("80img", "--budget 80img is 10 steps, the budget of 1ep is 10; write a longer one"),
    ],
)
def test_budget_that_is_not_longer_than_the_old_one_is_told_with_the_numbers(
    budget: str, told: str, runs: Path, record: SweepRecord
) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    with pytest.raises(RunDirError, match=told):
        extend(runs, record, budget, record.trials[:1])


def test_child_that_made_no_step_of_its_own_is_not_taken_further(runs: Path, record: SweepRecord) -> None:
    parent = record.trials[0]
    write_checkpoint(runs / "trials" / parent.id, 4)
    first = extend(runs, record, "2ep", [parent])
    (child,) = first.trials
    prepare_run_dir(runs, child)
    with pytest.raises(RunDirError) as error:
        extend(runs, first.record, "3ep")
    assert f"{child.label}: has no checkpoint of its own, its newest is step 4 of trial {parent.id}" in str(error.value)
    assert f"resume it without --budget first, or `orchestrate resume {parent.id[:8]} --budget 3ep`" in str(error.value)
    write_checkpoint(runs / "trials" / child.id, 8)
    (grandchild,) = extend(runs, first.record, "3ep").trials
    assert grandchild.config["continues"] == {"trial": child.id, "step": 8}


def test_checkpoint_of_another_trial_is_no_beginning(runs: Path, record: SweepRecord) -> None:
    parent, other = record.trials
    path = write_checkpoint(runs / "trials" / parent.id, 4)
    (child,) = extend(runs, record, "2ep", [parent]).trials
    shutil.rmtree(path)
    shutil.copytree(write_checkpoint(runs / "trials" / other.id, 4), path)
    assert f"but {path}: is of trial {other.id}" in missing_beginning(runs, child)


@pytest.mark.parametrize(("budget", "reason"), [("soon", "not an amount"), ("2gpuh", "needs a length in ep, img or")])
def test_budget_that_is_no_length_is_refused(runs: Path, record: SweepRecord, budget: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--budget: '{budget}': {reason}"):
        extend(runs, record, budget)


def test_trial_without_a_checkpoint_has_nothing_to_continue(runs: Path, record: SweepRecord) -> None:
    with pytest.raises(RunDirError, match="no whole checkpoint in"):
        extend(runs, record, "2ep")


def test_trial_is_not_taken_further_while_a_job_works_on_it(runs: Path, record: SweepRecord) -> None:
    made = bench(runs)
    one = record.only(record.trial_ids[:1])
    script_all(runs, one, {"*": "wait"})
    made.session.make_true(one, once=True)
    rank_pids(runs, one.trial_ids[0])
    write_checkpoint(runs / "trials" / one.trial_ids[0], 4)
    with pytest.raises(RunDirError, match="a job works on it; let it end, or `orchestrate cancel"):
        extend(runs, record, "2ep", one.trials)
    target = Target(one, one.trials, whole=True)
    with pytest.raises(RunDirError, match="a job works on it"):
        at_zero_stage(target, 1, observe(runs, one.trial_ids, made.launcher))


def test_name_of_another_sweep_is_not_taken(runs: Path, record: SweepRecord) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    save_record(runs, replace(record, name="study-2ep"))
    with pytest.raises(RunDirError, match="study-2ep: another sweep has this name"):
        extend(runs, record, "2ep", record.trials[:1])


def test_lost_checkpoint_of_the_parent_is_told_before_anything_starts(runs: Path, record: SweepRecord) -> None:
    checkpoint = write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    target = extend(runs, record, "2ep", record.trials[:1])
    assert missing_beginning(runs, target.trials[0]) == ""
    (checkpoint / "model.safetensors").unlink()
    problems = find_problems(target.record, runs, bench(runs).launcher, check_data=lambda url: None)
    assert any(f"continues trial {record.trials[0].id}, but" in problem for problem in problems)
    with pytest.raises(RunDirError, match=r"model\.safetensors is missing"):
        bring_beginning(runs, target.trials[0])


def test_metrics_of_a_child_that_lost_its_checkpoints_stay(runs: Path, record: SweepRecord) -> None:
    write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    (child,) = extend(runs, record, "2ep", record.trials[:1]).trials
    prepare_run_dir(runs, child)
    run = run_dir_of(runs, child.id)
    write_checkpoint(run.path, 12)
    shutil.rmtree(run.checkpoints)
    prepare_run_dir(runs, child)
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004"]
    assert steps_in(run.path) == list(range(1, 13))


def test_child_with_checkpoints_at_a_url_starts_although_the_local_ones_are_gone(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, seeds=(0,))
    file.write_text(file.read_text().replace("workers: 1", f"workers: 1, checkpoint_url: 'file://{tmp_path}/kept'"))
    record = record_of(file)
    checkpoint = write_checkpoint(runs / "trials" / record.trials[0].id, 4)
    (child,) = extend(runs, record, "2ep").trials
    prepare_run_dir(runs, child)
    run = run_dir_of(runs, child.id)
    write_checkpoint(run.path, 12)
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(checkpoint)
    assert missing_beginning(runs, child) == ""
    prepare_run_dir(runs, child)
    assert list_checkpoints(run.checkpoints) == []
    assert steps_in(run.path) == list(range(1, 13))


def test_sweep_of_children_is_trained_and_explained_as_any_other(runs: Path, record: SweepRecord) -> None:
    for trial in record.trials:
        write_checkpoint(runs / "trials" / trial.id, 10)
    target = extend(runs, record, "2ep")
    made = bench(runs)
    assert made.session.make_true(target.record)
    seen = observe(runs, target.record.trial_ids, made.launcher)
    child = target.trials[0]
    told = explain(target.record, child, runs, seen[child.id], now=0.0)
    assert told.state == "COMPLETED"
    assert f"continues trial {record.trials[0].id} from its checkpoint of step 10" in told.facts
    assert all(attempt.checkpoint_before == 10 for attempt in seen[child.id].attempts)


def test_another_zero_stage_is_the_same_trial(runs: Path, record: SweepRecord) -> None:
    parent, other = record.trials
    prepare_run_dir(runs, parent)
    target = at_zero_stage(Target(record, (parent,), whole=False), 1, {})
    assert [trial.id for trial in target.record.trials] == [parent.id, other.id]
    assert [trial.config["system"]["zero_stage"] for trial in target.record.trials] == [1, 0]
    prepare_run_dir(runs, target.trials[0])
    config = load_run(run_dir_of(runs, parent.id).config_file)
    assert config.system.zero_stage == 1
    assert config.fingerprint() == parent.id


def test_zero_stage_of_a_trial_that_left_the_sweep_can_be_changed(runs: Path, record: SweepRecord) -> None:
    old = replace(record, trials=record.trials[1:], removed=record.trials[:1])
    target = at_zero_stage(Target(old, old.removed, whole=False), 1, {})
    assert target.record.following(old).removed[0].config["system"]["zero_stage"] == 1


def test_zero_stage_that_cannot_be_is_refused_with_its_reason(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    file.write_text(file.read_text().replace("workers: 1", "workers: 1, engine: ddp"))
    record = record_of(file)
    with pytest.raises(ConfigError, match=r"system\.zero_stage: 1: plain DDP has no ZeRO"):
        at_zero_stage(Target(record, record.trials, whole=True), 1, {})


def test_zero_stage_3_of_a_method_with_own_parameters_is_refused(runs: Path, tmp_path: Path, bare_method: str) -> None:
    file = write_sweep(tmp_path)
    file.write_text(file.read_text().replace("name: simclr, embed_dim: 16", f"name: {bare_method}"))
    record = record_of(file)
    with pytest.raises(ConfigError, match=r"system\.zero_stage: 3: scale belongs to Bare itself"):
        at_zero_stage(Target(record, record.trials, whole=True), 3, {})


@pytest.mark.parametrize(("start", "step", "refused"), [("50%", 5, False), ("50%", 6, True), ("0.5ep", 6, False)])
def test_longer_training_does_not_go_back_to_an_earlier_stage(
    start: str, step: int, refused: bool, runs: Path, tmp_path: Path, staged_method: str
) -> None:
    file = write_sweep(tmp_path, seeds=(0,))
    text = file.read_text().replace("name: simclr, embed_dim: 16", f"name: {staged_method}")
    file.write_text(text.replace("budget: 1ep", f"budget: 1ep, stages: {{starts: [{start}]}}"))
    record = record_of(file)
    write_checkpoint(runs / "trials" / record.trials[0].id, step)
    if not refused:
        assert len(extend(runs, record, "2ep").trials) == 1
        return
    with pytest.raises(
        RunDirError, match="stage 2 began at step 5; of the longer training it would begin at 10, and 6"
    ):
        extend(runs, record, "2ep")
