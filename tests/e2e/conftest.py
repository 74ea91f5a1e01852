"""A small real sweep: packed images, two ranks, DeepSpeed, the command line as a person types it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrate.config.run import RunConfig, parse_run
from orchestrate.data.index import dataset_identity
from orchestrate.runs import RunDir, create_run_dir
from orchestrate.sweep.space import pin
from tests.data.object_store import object_store  # noqa: F401 (a fixture)
from tests.datasets import make_shapes

CLUSTER = """
launcher: local
resources: {{nodes: 1, ranks_per_node: {ranks}, cpus_per_rank: 1, device: cpu}}
limits: {{parallel: 1, min_free_gb: 0.1}}
"""
SWEEP = """
name: small
base:
  data: {{train: {data}/train, val: {data}/val}}
  method: {{name: simclr, embed_dim: 16, hidden_dim: 32}}
  backbone: {{name: tiny_resnet}}
  views: {{name: small_grey, size: 28}}
  optim: {{name: adamw, lr: 4.0e-3}}
  train: {{global_batch: 32, budget: 3ep, warmup: 10%, seed: 0}}
  probes: [{{name: knn, k: 5}}, {{name: linear, epochs: 5}}]
  system: {{checkpoint_every: 4step}}
space:
  method:
    - {{name: simclr, embed_dim: 16, hidden_dim: 32}}
    - {{name: barlow_twins, embed_dim: 16}}
objective: {{metric: knn_k5_cosine_t0.07.top1, goal: max}}
"""


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a training set of 203 images, which no batch divides, and a validation set of 101."""
    folder = tmp_path_factory.mktemp("datasets")
    make_shapes(folder / "train", 203, seed=0)
    make_shapes(folder / "val", 101, seed=1, split="val")
    return folder


@pytest.fixture(scope="session")
def sweep_file(datasets: Path) -> Path:
    """A sweep of two trials of 19 steps."""
    path = datasets / "sweep.yaml"
    path.write_text(SWEEP.format(data=datasets))
    return path


def cluster_file(folder: Path, ranks: int = 2) -> Path:
    """Write a cluster config for this machine."""
    path = folder / f"local-{ranks}.yaml"
    path.write_text(CLUSTER.format(ranks=ranks))
    return path


def run_file(folder: Path, sweep: Path, name: str, **system: object) -> Path:
    """Write the sweep's base as a run of its own."""
    base = yaml.safe_load(sweep.read_text())["base"]
    base["system"] |= system
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def made_run(folder: Path, sweep: Path, **changes: Any) -> RunDir:
    """Make the RunDir of the sweep's base, with the plain DDP engine, which starts fastest."""
    values = yaml.safe_load(sweep.read_text())["base"]
    values["system"]["engine"] = "ddp"
    for section, value in changes.items():
        values[section] |= value
    config, problems = parse_run(values)
    assert isinstance(config, RunConfig), problems
    config, _, problems = pin(config, dataset_identity)
    assert not problems
    return create_run_dir(folder / config.fingerprint(), config.to_yaml())


def orchestrate(*arguments: object, check: bool = True, timeout: float = 280) -> "subprocess.CompletedProcess[str]":
    """Type a command."""
    command = [sys.executable, "-m", "orchestrate", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATE_")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert not check or result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result
