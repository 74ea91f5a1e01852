"""SIGKILL of everything, in a save, and of one rank, changes no number. The long version is the script itself."""

import random
from pathlib import Path

import pytest

from tests.e2e.conftest import cluster_file, orchestrate
from tests.e2e.kill_and_resume import KINDS, Disturbance, compare

# Between them: a queue, twins, a centre, schedules, a loss scale, a layer that is held still, moments in parts.
SWEEP = """
name: killed
base:
  data: {{train: {data}/train, val: {data}/val}}
  train: {{global_batch: 32, budget: 100step, warmup: 10%, seed: 0}}
  probes: [{{name: knn, k: 5}}]
space:
  method, backbone, views, optim, train.precision, system:
    - - {{name: moco, embed_dim: 16, hidden_dim: 32, queue_size: 128}}
      - {{name: tiny_resnet}}
      - {{name: small_grey, size: 28}}
      - {{name: sgd, lr: 0.2}}
      - fp32
      - {{checkpoint_every: 4step}}
    - - {{name: dino, embed_dim: 16, hidden_dim: 32, output_dim: 64, temperature_warmup_epochs: 4}}
      - {{name: tiny_vit}}
      - {{name: small_dino, size: 28}}
      - {{name: adamw, lr: 4.0e-3, final_weight_decay: 0.4, clip: per_tensor, freeze_last_layer: 30step}}
      - fp16
      - {{checkpoint_every: 4step, zero_stage: 2}}
"""


@pytest.mark.timeout(900)  # some fifteen starts of two ranks, beside whatever else the machine does
def test_killed_sweep_ends_byte_identical_to_an_undisturbed_one(datasets: Path, tmp_path: Path) -> None:
    sweep, cluster = tmp_path / "sweep.yaml", cluster_file(tmp_path)
    sweep.write_text(SWEEP.format(data=datasets))
    quiet, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    orchestrate("sweep", sweep, "--cluster", cluster, "--runs", quiet)
    disturbance = Disturbance(sweep, cluster, disturbed, random.Random(0))
    kills = disturbance.run(["training", "save", "one rank", "anytime"], longest=8.0, steps=20)
    assert set(kills) == set(KINDS)
    rows = compare(quiet, disturbed)
    assert len(rows) == 2
    assert all(row["same"] for row in rows), rows
