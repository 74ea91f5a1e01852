from pathlib import Path

import pytest

from orchestrate.errors import ConfigError
from orchestrate.launchers.base import load_launcher
from orchestrate.launchers.cluster import ClusterConfig, load_cluster

PRESETS = sorted((Path(__file__).parents[2] / "cluster_configs").glob("*.yaml"))


def read(folder: Path, slurm: str, *, more: str = "") -> ClusterConfig:
    (folder / "cluster.yaml").write_text(f"launcher: slurm\n{more}slurm:\n  {slurm}\n")
    return load_cluster(folder / "cluster.yaml")


def refused(folder: Path, slurm: str, *, more: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, slurm, more=more)
    return str(caught.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_have_a_launcher(path: Path, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    assert load_launcher(cluster, tmp_path).poll_seconds > 0


@pytest.mark.parametrize(
    ("slurm", "told"),
    [
        (r'account: "a\nb"', "slurm.account: 'a\\nb': has a line break"),
        (r'setup: ["module load x\nrm -r y"]', "slurm.setup.0: 'module load x\\nrm -r y': has a line break"),
        (r'container: ["a\x07b"]', "another character that cannot be printed"),
        (r'options: {nice: "1\n#SBATCH --uid=0"}', "has a line break"),
        ("partition: a b", "slurm.partition: 'a b': has a space; write one word"),
        ('exclude: ["n1,n2"]', "slurm.exclude.0: 'n1,n2': is no name of a node"),
        ("options: {time: 5}", "slurm.options.time: 'time': is set by the launcher: write slurm.time_minutes"),
        ("options: {job-name: x}", "is set by the launcher: jobs are found again by it"),
        ("options: {--nice: 5}", "is no long option of sbatch"),
        ("options: {mail_type: END}", "is no long option of sbatch"),
        ("{gres: 'gpu:2', gpus_per_node: 2}", "slurm.gpus_per_node: 2: gres: 'gpu:2' asks for GPUs too"),
        ("{time_minutes: 2}", "slurm.lead_seconds: 120: of 2 min, 120 s are for saving"),
        ("evaluate: {partition: t4}", "there are no jobs that only evaluate; write `evaluate: {...}` as well"),
        ("partion: x", "slurm.partion: unknown key; did you mean `partition`?"),
    ],
)
def test_what_slurm_would_misread_is_refused(slurm: str, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, slurm)


def test_time_of_evaluation_must_leave_time_to_work(tmp_path: Path) -> None:
    told = refused(tmp_path, "evaluate: {time_minutes: 1}", more="evaluate: {ranks_per_node: 1}\n")
    assert "slurm.evaluate: {'time_minutes': 1}: of 1 min, 120 s are for saving" in told


def test_options_of_slurm_say_nothing_to_another_launcher(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("launcher: local\nslurm: {partition: a}\n")
    with pytest.raises(ConfigError, match="says nothing to the launcher"):
        load_cluster(tmp_path / "cluster.yaml")


def test_gpus_of_the_evaluation_replace_those_of_the_training(tmp_path: Path) -> None:
    slurm = "{gres: 'gpu:a100:4', memory_gb: 200, evaluate: {gpus_per_node: 1}}"
    options = read(tmp_path, slurm, more="evaluate: {ranks_per_node: 1}\n").slurm
    assert (options.at("evaluate").gres, options.at("evaluate").gpus_per_node) == ("", 1)
    assert (options.at("pretrain").gres, options.at("evaluate").memory_gb) == ("gpu:a100:4", 200)


def test_generic_resource_that_is_no_gpu_goes_with_a_number_of_gpus(tmp_path: Path) -> None:
    assert read(tmp_path, "{gres: 'nvme:1', gpus_per_node: 2}").slurm.gpus_per_node == 2
