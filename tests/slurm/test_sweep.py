"""A sweep on a real Slurm as a newcomer types it, from packing to the report, in the shipped cluster config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrate.launchers.attempts import load_attempts
from orchestrate.runs import RunDir
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.studies import clean_environment

pytestmark = [pytest.mark.timeout(300)]

SWEEP = """
name: fashion
base:
  data: {{train: {folder}/train, val: {folder}/val}}
  method: {{name: barlow_twins, embed_dim: 64}}
  backbone: {{name: tiny_resnet}}
  views: {{name: small_grey, size: 28}}
  optim: {{name: adamw, lr: 4.0e-3}}
  train: {{global_batch: 64, budget: 2ep, warmup: 10%, seed: 0}}
  probes: [{{name: knn, k: 20}}]
  system: {{engine: ddp}}
space:
  train.seed: [0]
objective: {{metric: knn_k20_cosine_t0.07.top1, goal: max}}
"""


def test_barlow_twins_on_two_nodes_of_two_ranks_goes_from_submission_to_report(slurm: Cluster, tmp_path: Path) -> None:
    def orchestrate(*arguments: object) -> str:
        command = [sys.executable, "-m", "orchestrate", *map(str, arguments)]
        environment = clean_environment(slurm.environment)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    orchestrate("data", "pack", "fashion-mnist", tmp_path / "train", "--limit", 800)
    orchestrate("data", "pack", "fashion-mnist", tmp_path / "val", "--split", "test", "--limit", 300)
    sweep, runs = tmp_path / "fashion.yaml", tmp_path / "runs"
    sweep.write_text(SWEEP.format(folder=tmp_path))
    place = ("--cluster", ROOT / "cluster_configs" / "mini_slurm.yaml", "--runs", runs)

    planned = orchestrate("plan", sweep, *place)
    assert "#SBATCH --nodes=2" in planned
    assert "start at" in planned  # what sbatch --test-only says
    assert "done" in orchestrate("sweep", sweep, *place)

    (path,) = (runs / "trials").iterdir()
    (attempt,) = load_attempts(RunDir(path))
    done = json.loads(RunDir(path).done_file.read_text())
    assert (attempt.ranks, len(attempt.nodes)) == (4, 2)
    assert done["metrics"]["knn_k20_cosine_t0.07.top1"] > done["metrics"]["random_init/knn_k20_cosine_t0.07.top1"] - 0.2
    assert path.name[:8] in (runs / "sweeps/fashion/report/index.html").read_text()
    (job,) = slurm.jobs(f"oc-{path.name}")
    assert job.state == "COMPLETED"
    logs = sorted(log.name for log in RunDir(path).log_file(1, 0).parent.iterdir())
    assert logs == ["rank-0.log", "rank-1.log", "rank-2.log", "rank-3.log", "srun.log"]
