"""A trial that was done, trained on to a longer budget by `orchestrate resume --budget`."""

import json
from pathlib import Path

import yaml

from tests.e2e.conftest import cluster_file, orchestrate


def run_file(folder: Path, sweep: Path, budget: str) -> Path:
    """Write the sweep's base as a run whose learning rate does not depend on its length."""
    values = yaml.safe_load(sweep.read_text())["base"]
    values["train"] |= {"budget": budget, "warmup": "0ep", "schedule": {"name": "constant"}}
    values["system"] |= {"engine": "ddp"}
    values["probes"] = values["probes"][:1]
    path = folder / f"run-{budget}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_training_that_was_extended_equals_one_that_was_long_from_the_start(sweep_file: Path, tmp_path: Path) -> None:
    runs, cluster = tmp_path / "runs", cluster_file(tmp_path, ranks=1)
    for budget in ("10step", "16step"):
        orchestrate("run", run_file(tmp_path, sweep_file, budget), "--cluster", cluster, "--runs", runs)
    orchestrate("resume", "run-10step", "--budget", "16step", "--runs", runs)
    trials = {
        name: runs / "trials" / json.loads((runs / "sweeps" / name / "sweep.json").read_text())["trials"][0]["id"]
        for name in ("run-16step", "run-10step-16step")
    }
    long, extended = trials.values()
    weights = [(trial / "results" / "weights.safetensors").read_bytes() for trial in (long, extended)]
    assert weights[0] == weights[1]
    losses = [
        [(step["step"], step["batch"], step["loss"]) for step in map(json.loads, (trial / "metrics.jsonl").open())]
        for trial in (long, extended)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 16
    attempt = json.loads((extended / "attempts" / "1.json").read_text())
    assert attempt["first_step"] == 10
