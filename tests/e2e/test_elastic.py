"""A training that goes on with other numbers of ranks: saved by 2, resumed by 4, then 1, then 2 again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from orchestrate.runs import RunDir
from tests.e2e.conftest import made_run

STEPS = 40
STOPS = {2: 10, 4: 20, 1: 30}  # ranks: stopped after at least so many steps


def staged_run(folder: Path, sweep: Path, zero_stage: int) -> RunDir:
    """Make the RunDir of a training of `STEPS` steps at a ZeRO stage."""
    system = {"engine": "deepspeed", "zero_stage": zero_stage}
    return made_run(folder, sweep, train={"budget": f"{STEPS}step"}, optim={"lr": 1e-3}, system=system)


def work(run: RunDir, world_size: int, *, until: int = STEPS) -> int:
    """Start the ranks, ask them to stop once `until` steps are logged, and return their exit code."""
    rendezvous = run.path / f"rendezvous-{time.monotonic_ns()}"
    common = {"WORLD_SIZE": str(world_size), "ORCHESTRATE_RENDEZVOUS": f"file://{rendezvous}"}
    common |= {"ORCHESTRATE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "orchestrate.worker", str(run.path)]
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    while until < STEPS and len(log_of(run)) < until and ranks[0].poll() is None:
        time.sleep(0.005)  # steps take longer
    if until < STEPS:
        run.stop_file.touch()
    codes = {rank.wait(timeout=240) for rank in ranks}
    run.stop_file.unlink(missing_ok=True)
    assert len(codes) == 1, codes
    return codes.pop()


def log_of(run: RunDir) -> list[dict[str, Any]]:
    lines = run.metrics_file.read_text().splitlines(keepends=True) if run.metrics_file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sweep_file: Path) -> list[dict[str, Any]]:
    run = staged_run(tmp_path_factory.mktemp("undisturbed"), sweep_file, zero_stage=0)
    assert work(run, 2) == 0
    return log_of(run)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_batches_and_loss_go_on_through_other_numbers_of_ranks(
    zero_stage: int, sweep_file: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    run = staged_run(tmp_path, sweep_file, zero_stage)
    for world_size, until in STOPS.items():
        assert work(run, world_size, until=until) == 75
    assert work(run, 2) == 0
    log = log_of(run)
    assert [step["step"] for step in log] == list(range(1, STEPS + 1))
    assert [step["batch"] for step in log] == [step["batch"] for step in undisturbed]
    # Sums over other ranks round differently by 1e-7 of the loss, which 40 steps of AdamW amplify to about 1e-4.
    assert [step["loss"] for step in log] == pytest.approx([step["loss"] for step in undisturbed], rel=1e-3)


def test_training_in_parts_ends_with_whole_weights_and_scores(sweep_file: Path, tmp_path: Path) -> None:
    run = staged_run(tmp_path, sweep_file, zero_stage=3)
    assert work(run, 2) == 0
    weights = load_file(run.weights_file)
    values = yaml.safe_load(run.config_file.read_text())
    assert values["system"]["zero_stage"] == 3
    assert {name for name, value in weights.items() if value.numel() == 0} == set()
    assert run.done_file.exists()
