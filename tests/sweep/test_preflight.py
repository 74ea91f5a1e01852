import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.errors import ConfigError, DataError
from orchestrate.evaluation.probes.knn import Knn
from orchestrate.sweep.batches import advice
from orchestrate.sweep.continuation import extended
from orchestrate.sweep.find import Target
from orchestrate.sweep.observe import observe
from orchestrate.sweep.preflight import check_start
from orchestrate.sweep.record import SweepRecord
from tests.launchers.jobs import launcher
from tests.sweep.checkpoints import write_checkpoint
from tests.sweep.sweeps import bench, record_of, write_sweep


def whole(url: str) -> None:
    """Find nothing wrong with a dataset."""


def problems(record: SweepRecord, runs: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_start(record, runs, launcher(runs), check_data=whole)
    return str(caught.value)


def test_sound_sweep_passes_and_nothing_is_written(runs: Path, tmp_path: Path) -> None:
    check_start(record_of(write_sweep(tmp_path)), runs, launcher(runs), check_data=whole)
    assert not runs.exists()


def test_batch_that_does_not_divide_is_refused_with_those_that_do(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, batch=10), ranks=4)
    told = problems(record, runs)
    assert "train.global_batch: 10: does not divide by the 4 ranks of the cluster; write 8, 12" in told


def test_job_larger_than_all_ranks_together_is_refused(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    bounded = record.cluster | {"limits": {"ranks": 3, "min_free_gb": 0}, "evaluate": {"ranks_per_node": 4}}
    told = problems(replace(record, cluster=bounded), runs)
    assert "limits.ranks: 3: evaluate gives a job 4 ranks; raise the limit" in told
    assert "resources" not in told


def test_misspelt_objective_is_refused_before_anything_is_trained(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    file.write_text(file.read_text().replace("metric: knn.top1", "metric: knm.top1"))
    assert "objective.metric: 'knm.top1': no such probe; did you mean `knn.top1`?" in problems(record_of(file), runs)


TWO_KNN = "probes: [{name: knn, k: 20}, {name: knn, k: 5}]"


def with_objective(folder: Path, metric: str, probes: str = "probes: [{name: knn, k: 20}]") -> SweepRecord:
    file = write_sweep(folder)
    text = file.read_text().replace("metric: knn.top1", f"metric: {metric}")
    file.write_text(text.replace("probes: [{name: knn, k: 20}]", probes))
    return record_of(file)


def test_objective_may_name_a_probe_or_its_whole_protocol(runs: Path, tmp_path: Path) -> None:
    for metric, probes in (("knn.top1", "probes: [{name: knn}]"), (f"{Knn(k=5).key}.top1", TWO_KNN)):
        check_start(with_objective(tmp_path, metric, probes), runs, launcher(runs), check_data=whole)


@pytest.mark.parametrize(
    ("metric", "probes", "told"),
    [
        ("knn_k99.top1", TWO_KNN, f"no such probe; known: {Knn(k=20).key}.top1, {Knn(k=5).key}.top1"),
        ("knn.top1", TWO_KNN, f"knn has several protocols; write one of {Knn(k=20).key}.top1, {Knn(k=5).key}.top1"),
        ("knn", "probes: [{name: knn}]", "names no number of a probe; write one of knn.top1"),
        ("knn.", "probes: [{name: knn}]", "names no number of a probe; write one of knn.top1"),
        ("knn.top1", "probes: []", "no trial has a probe; add one to `probes`, or remove the objective"),
    ],
)
def test_objective_that_no_probe_measures_is_refused(
    metric: str, probes: str, told: str, runs: Path, tmp_path: Path
) -> None:
    record = with_objective(tmp_path, metric, probes)
    assert f"objective.metric: {metric!r}: {told}" in problems(record, runs)


def test_full_disk_is_refused(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    record.cluster["limits"]["min_free_gb"] = 1e9
    assert "limits.min_free_gb is 1e+09" in problems(record, runs)


def test_run_dir_of_another_config_is_refused(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    bench(runs).session.make_true(record)
    first, second = (runs / "trials" / trial_id for trial_id in record.trial_ids)
    shutil.rmtree(second / "results")
    shutil.copy(first / "run.yaml", second / "run.yaml")
    assert f"is the config of trial {first.name}" in problems(record, runs)


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert "is not a folder" in problems(record_of(write_sweep(tmp_path)), tmp_path / "runs")


def test_all_problems_are_told_at_once_and_each_once(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, batch=10), ranks=4)
    record.cluster["limits"]["min_free_gb"] = 1e9

    def broken(url: str) -> None:
        raise DataError(f"{url}: no manifest.json")

    with pytest.raises(ConfigError) as caught:
        check_start(record, runs, launcher(runs), check_data=broken)
    told = str(caught.value).splitlines()
    assert len(told) == 4  # disk, batch, train, val
    assert caught.value.exit_code == 2
    assert not runs.exists()


def test_method_tied_to_the_rank_count_does_not_go_on_with_another(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, seeds=(0,))
    file.write_text(file.read_text().replace("name: simclr", "name: moco"))
    record = record_of(file)
    write_checkpoint(runs / "trials" / record.trial_ids[0], 4, ranks=4)
    told = problems(record, runs)
    assert "saved by 4 ranks, the cluster has 2: batch norm sees one rank's part of the batch; start 4 ranks" in told
    file.write_text(file.read_text().replace("workers: 1", "workers: 1, elastic: true"))
    check_start(record_of(file), runs, launcher(runs), check_data=whole)


def test_child_without_a_checkpoint_is_tied_to_the_ranks_of_its_parent(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, seeds=(0,))
    file.write_text(file.read_text().replace("name: simclr", "name: moco"))
    record = record_of(file)
    write_checkpoint(runs / "trials" / record.trial_ids[0], 4, ranks=4)
    target = Target(record, record.trials, whole=True)
    observed = observe(runs, record.trial_ids, launcher(runs))
    children = extended(target, "2ep", runs, observed, command=("orchestrate", "resume")).record
    assert "saved by 4 ranks, the cluster has 2" in problems(children, runs)


def staged_sweep(folder: Path, method: str) -> SweepRecord:
    file = write_sweep(folder)
    text = file.read_text().replace("name: simclr, embed_dim: 16", f"name: {method}, most_ranks: 2")
    file.write_text(text.replace("budget: 1ep", "budget: 1ep, stages: {starts: [50%]}"))
    return record_of(file, ranks=4)


def test_batch_that_a_method_cannot_take_on_the_ranks_of_the_cluster_is_refused(
    runs: Path, tmp_path: Path, staged_method: str
) -> None:
    record = staged_sweep(tmp_path, staged_method)
    assert problems(record, runs) == (
        f"{tmp_path}/study.yaml: method: staged: on 4 ranks: takes 2 ranks at most, not 4; start fewer"
    )
    smaller = replace(record, cluster=record.cluster | {"resources": {"ranks_per_node": 2}})
    check_start(smaller, runs, launcher(runs), check_data=whole)


def test_advice_of_a_method_is_told_once_for_all_trials_of_its_kind(tmp_path: Path, staged_method: str) -> None:
    record = staged_sweep(tmp_path, staged_method)
    told = advice(record, record.trials)
    assert told == ("staged: was published with 4096 images a batch, not 8 on 4",)
    assert advice(record, ()) == ()
