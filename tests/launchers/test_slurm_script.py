import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers.base import LaunchPlan, RunSpec, worker_environment
from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.slurm_script import (
    Request,
    array_script,
    excluded_nodes,
    job_script,
    script_path,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
PYTHON = "/shared/venv/bin/python"
TRIAL = "00112233aabbccdd"
HOSTILE = Path('/shared/my runs\' $HOME/100%/"a\\b"')


def config(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"launcher": "slurm", **changes})


def planned(
    cluster: ClusterConfig,
    *,
    runs: Path = Path("/shared/runs"),
    stage: str = "pretrain",
    exclude: tuple[str, ...] = (),
    trial: str = TRIAL,
) -> tuple[LaunchPlan, Request]:
    run_dir, cwd = runs / "trials" / trial, Path("/home/ada/checkout")
    spec = RunSpec(trial, run_dir, 1, stage=stage, code=Path("/shared/runs/code/abc"), sweep="dims")
    resources = cluster.stage_resources(stage)
    plan = LaunchPlan(
        name=spec.name,
        run_dir=spec.folder.path,
        attempt=1,
        command=(cluster.slurm.python or PYTHON, "-m", "orchestrate.worker", str(run_dir)),
        environment=worker_environment(cluster, spec, cwd),
        ranks=resources.ranks,
        cwd=cwd,
        stage=stage,
        nodes=resources.nodes,
    )
    comment = f"dims/{trial}/{stage}"
    return plan, Request(resources, cluster.slurm.at(stage), exclude=exclude, comment=comment)


TWO_BY_TWO = {"nodes": 2, "ranks_per_node": 2}
GPUS = {"nodes": 2, "ranks_per_node": 4, "cpus_per_rank": 8, "device": "cuda"}


def script_of(name: str) -> str:
    if name == "array":
        cluster = config(resources={"nodes": 1}, slurm={"partition": "cpu", "time_minutes": 30, "arrays": True})
        parts = [planned(cluster, trial=f"{number:016x}", exclude=("n7",)) for number in range(3)]
        plans, request = [plan for plan, _ in parts], replace(parts[0][1], comment="3 jobs")
        return array_script("oc-array-0123456789abcdef", plans, request, folder=Path("/shared/runs/arrays/x y"))
    cluster, given = {
        "two_nodes": (config(resources=TWO_BY_TWO), {}),
        "gpus": (config(resources=GPUS, slurm={"account": "vision", "memory_gb": 1.5, "exclusive": True}), {}),
        "gpus_by_type": (config(resources=GPUS, slurm={"gres": "gpu:a100:4", "constraint": "a100&nvlink"}), {}),
        "local_disk": (config(resources=GPUS, slurm={"gres": "nvme:1"}), {}),
        "preemptible": (
            config(
                resources={"ranks_per_node": 2, "device": "cuda"},
                slurm={
                    "partition": "spot,low",
                    "qos": "scavenger",
                    "time_minutes": 120,
                    "lead_seconds": 300,
                    "exclude": ["gpu[07-09]"],
                    "options": {"mail-type": "FAIL", "contiguous": True, "spread-job": False, "nice": 10},
                },
            ),
            {"exclude": ("gpu12", "gpu30")},
        ),
        "container": (
            config(
                resources=GPUS,
                environment={"NCCL_DEBUG": "WARN", "TITLE": "it's $HOME"},
                slurm={
                    "setup": ["module load cuda/12.4", 'export CACHE="$TMPDIR/my cache"'],
                    "container": ["apptainer", "exec", "--nv", "--bind", "/data sets:/data", "/images/it's $1.sif"],
                    "python": "/opt/conda/bin/python",
                    "srun": ["--mpi=none", "--container-writable"],
                },
            ),
            {"runs": HOSTILE},
        ),
        "evaluate": (
            config(
                resources=GPUS,
                evaluate={"ranks_per_node": 1, "cpus_per_rank": 4, "device": "cuda"},
                slurm={"partition": "a100", "gres": "gpu:a100:4", "time_minutes": 600, "memory_gb": 200}
                | {"evaluate": {"partition": "t4", "gpus_per_node": 1, "time_minutes": 60, "memory_gb": 30}},
            ),
            {"stage": "evaluate"},
        ),
    }[name]
    return job_script(*planned(cluster, **given), keeper=PYTHON)  # type: ignore[arg-type]


NAMES = ["two_nodes", "gpus", "gpus_by_type", "local_disk", "preemptible", "container", "evaluate", "array"]


@pytest.mark.parametrize("name", NAMES)
def test_script_is_as_it_was(name: str) -> None:
    text, golden = script_of(name), GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "scripts changed; if they should, run with UPDATE_GOLDEN=1"


@pytest.mark.parametrize("name", NAMES)
def test_script_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n"], input=script_of(name), text=True, check=True)


def talking(folder: Path) -> str:
    """Make an interpreter that tells what it was given instead of running it."""
    path = folder / "it's a $keeper"
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_bash_hands_on_every_word_and_variable_as_it_is(tmp_path: Path) -> None:
    values = {"TITLE": 'it\'s $HOME `x` "y" \\', "EMPTY": ""}
    cluster = config(
        resources=TWO_BY_TWO,
        environment=values,
        slurm={"container": ["run it", "a'b", "$X"], "setup": ['export CACHE="$HOME/cache"']},
    )
    plan, request = planned(cluster, runs=HOSTILE)
    text = job_script(plan, request, keeper=talking(tmp_path))
    told = subprocess.run(["bash"], input=text, text=True, check=True, capture_output=True, env={"HOME": "/h"})
    words, environment = json.loads(told.stdout)
    keeper, worker = words[: words.index("--")], words[words.index("run it") :]
    folder = str(plan.run_dir)
    script = str(script_path(plan.run_dir))
    options = ["--run-dir", folder, "--script", script, "--lead-seconds", "120"]
    assert keeper == ["-m", "orchestrate.launchers.slurm_job", *options]
    assert worker == ["run it", "a'b", "$X", PYTHON, "-m", "orchestrate.launchers.slurm_rank", "--", *plan.command]
    assert f"--output={folder.replace('%', '%%')}/logs/attempt-{{attempt}}/rank-%t.log" in words
    assert values.items() <= environment.items()
    assert environment["CACHE"] == "/h/cache"
    assert environment["PYTHONPATH"].split(":")[:2] == ["/shared/runs/code/abc", "/home/ada/checkout"]


def test_array_runs_the_script_of_each_element_with_a_log_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / f"it's $HOME {number}" for number in range(3)]
    for folder in folders:
        (folder / "jobs").mkdir(parents=True)
        (folder / "logs").mkdir()
        script_path(folder).write_text('echo "I am $0"')
    (tmp_path / "folders.txt").write_text("".join(f"{folder}\n" for folder in folders))
    cluster = config(slurm={"arrays": True})
    plans = [replace(planned(cluster)[0], run_dir=folder) for folder in folders]
    text = array_script("oc-array-1", plans, planned(cluster)[1], folder=tmp_path)
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77", "PATH": os.environ["PATH"]}
    subprocess.run(["bash"], input=text, text=True, check=True, env=variables)
    assert (folders[1] / "logs" / "slurm-77_1.log").read_text() == f"I am {script_path(folders[1])}\n"
    assert not (folders[0] / "logs" / "slurm-77_0.log").exists()


def test_excluded_nodes_are_read_from_a_script() -> None:
    assert excluded_nodes(script_of("preemptible")) == ("gpu[07-09]", "gpu12", "gpu30")
    assert excluded_nodes(script_of("two_nodes")) == ()


def test_user_s_own_python_path_comes_after_the_frozen_code() -> None:
    plan, _ = planned(config(environment={"PYTHONPATH": "/mine", "OMP_NUM_THREADS": "3"}))
    assert plan.environment["PYTHONPATH"] == "/shared/runs/code/abc:/home/ada/checkout:/mine"
    assert plan.environment["PYTHONSAFEPATH"] == "1"
    assert plan.environment["OMP_NUM_THREADS"] == "3"
