"""Ranks and loader workers change how fast numbers come, not which."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import cluster_file, orchestrate, run_file


def steps_of(runs: Path) -> list[dict[str, Any]]:
    (path,) = runs.glob("trials/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_global_batches_and_first_loss_do_not_depend_on_ranks_or_workers(sweep_file: Path, tmp_path: Path) -> None:
    runs = {}
    for ranks, workers in ((1, 0), (2, 3), (4, 1)):
        runs[ranks, workers] = tmp_path / f"{ranks}-{workers}"
        run = run_file(tmp_path, sweep_file, f"ranks{ranks}", workers=workers)
        orchestrate("run", run, "--cluster", cluster_file(tmp_path, ranks), "--runs", runs[ranks, workers])
    logs = [steps_of(folder) for folder in runs.values()]
    assert (
        [step["batch"] for step in logs[0]]
        == [step["batch"] for step in logs[1]]
        == [step["batch"] for step in logs[2]]
    )
    # fp32 sums over other ranks round differently; the loss is near 3.
    assert [log[0]["loss"] for log in logs[1:]] == [pytest.approx(logs[0][0]["loss"], rel=1e-5)] * 2
