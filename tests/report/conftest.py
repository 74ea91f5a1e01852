"""Sweeps as files: what the orchestrator and its workers would have left behind."""

from __future__ import annotations

import hashlib
import json
import math
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrate.report.queries import Sweep, load_sweep

METRIC = "knn_k20_cosine.top1"


@dataclass
class FakeSweep:
    """A sweep under construction: `add` trials, give them results or a status, `write` sweep.json."""

    root: Path
    name: str = "study"
    goal: str = "max"
    fields: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sweep_dir(self) -> Path:
        return self.root / "sweeps" / "study"

    @property
    def trials_dir(self) -> Path:
        return self.root / "trials"

    def add(
        self, method: str = "barlow_twins", dim: int | None = 64, budget: int = 10, seed: int = 0, **axes: Any
    ) -> str:
        """Add a trial of `budget` epochs; further axes use `__` for a dot, as in optim__lr=0.1."""
        assignment: dict[str, Any] = {"method": {"name": method}, "train.budget": f"{budget}ep", "train.seed": seed}
        section: dict[str, Any] = {"name": method}
        if dim is not None:
            assignment["method.embed_dim"] = section["embed_dim"] = dim
        config: dict[str, Any] = {
            "data": {"train": "file:///data/train", "train_digest": "a1b2", "val_digest": "c3d4"},
            "method": section,
            "backbone": {"name": "tiny_resnet", "stem": "small"},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"budget": f"{budget}ep", "seed": seed, "global_batch": 128},
        }
        for key, value in axes.items():
            part, name = key.split("__")
            assignment[f"{part}.{name}"] = config[part][name] = value
        trial = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]
        self.trials.append({"id": trial, "assignment": assignment, "config": config})
        return trial

    def finish(self, trial: str, value: float, **changes: Any) -> None:
        """Give a trial a done.json: 1000 images and 2 seconds on 2 ranks an epoch, unless `changes` says otherwise."""
        budget = int(self.config(trial)["train"]["budget"].removesuffix("ep"))
        metrics = {METRIC: value, f"random_init/{METRIC}": 0.5, f"raw_pixels/{METRIC}": 0.75}
        done = {
            "fingerprint": trial, "step": 8 * budget, "images": 1000 * budget, "epochs": float(budget),
            "train_seconds": 2.0 * budget, "rank_seconds": 4.0 * budget, "world_size": 2, "device": "cpu",
            "num_train_samples": 1000, "metrics": metrics, "weights": "results/weights.safetensors",
            "versions": {"torch": "2.14.1", "orchestrate": "0.1.0"}, "finished": 1.7e9,
        }  # fmt: skip
        metrics |= changes.pop("metrics", {})
        self.put(trial, "results/done.json", done | changes)
        self.status(trial, "done", step=8 * budget, total_steps=8 * budget)
        self.attempt(trial, 1)

    def status(self, trial: str, state: str, **fields: Any) -> None:
        base = {"state": state, "step": 16, "total_steps": 80, "images": 2048, "world_size": 2, "attempt": 1}
        self.put(trial, "status.json", base | fields)

    def attempt(self, trial: str, number: int, seconds: float = 30.0, world_size: int = 2) -> None:
        self.put(
            trial,
            f"attempts/{number}.json",
            {"attempt": number, "world_size": world_size, "started": 1.7e9, "last_seen": 1.7e9 + seconds},
        )

    def job(self, trial: str, number: int, *, seconds: float | None = None, exit_code: int = 0, **facts: Any) -> None:
        """Add the record of a job's start and, if `seconds` are given, that of its end; of a host of long ago."""
        start = {"attempt": number, "ranks": 2, "started": 1.7e9, "host": socket.gethostname(), "boot_id": "", "pid": 1}
        self.put(trial, f"jobs/{number}.start.json", start | facts)
        if seconds is not None:
            end = {"attempt": number, "ended": 1.7e9 + seconds, "exit_code": exit_code}
            self.put(trial, f"jobs/{number}.end.json", end)

    def losses(self, trial: str, losses: list[float], steps_per_epoch: int = 8) -> None:
        lines = [
            json.dumps({"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": 0.1})
            for step, loss in enumerate(losses, start=1)
        ]
        self.put_text(trial, "metrics.jsonl", "".join(line + "\n" for line in lines))

    def put(self, trial: str, name: str, value: Any) -> None:
        self.put_text(trial, name, json.dumps(value))

    def put_text(self, trial: str, name: str, text: str) -> None:
        path = self.trials_dir / trial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def config(self, trial: str) -> dict[str, Any]:
        return next(entry["config"] for entry in self.trials if entry["id"] == trial)

    def write(self) -> Sweep:
        """Write sweep.json and read the whole sweep back."""
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        entry = {
            "name": self.name, "file": "sweeps/study.yaml", "sweep_yaml": f"name: {self.name}\n",
            "cluster_yaml": "launcher: local\n", "command": ["orchestrate", "sweep", "sweeps/my study.yaml"],
            "commit": "0123456789abcdef", "dirty": False, "created": 1.7e9,
            "objective": {"metric": METRIC, "goal": self.goal}, "trials": self.trials,
        }  # fmt: skip
        (self.sweep_dir / "sweep.json").write_text(json.dumps(entry | self.fields), encoding="utf-8")
        return load_sweep(self.sweep_dir, self.trials_dir)


def add_study(sweep: FakeSweep) -> None:
    """Fill in a study of five methods, three dimensions, four budgets and three seeds, with made-up learning curves."""
    final = {"barlow_twins": 0.86, "disco": 0.83, "esvit": 0.79, "s2_bnn": 0.74, "triplet": 0.845}
    for index, (method, best) in enumerate(final.items()):
        for dim in (64, 256, 1024):
            for budget in (2, 5, 10, 20):
                for seed in range(3):
                    trial = sweep.add(method, dim, budget, seed)
                    noise = 0.004 * math.sin(1.7 * seed + index + 0.01 * dim + budget)
                    value = best - (0.20 + 0.03 * index) * (budget + 0.6 * index) ** -0.7 - 1.1 / dim + noise
                    metrics = {f"random_init/{METRIC}": 0.612 + 0.003 * seed, f"raw_pixels/{METRIC}": 0.805}
                    seconds = budget * (31.0 + 6 * index + dim / 100)
                    costs = {"images": 60_000 * budget, "train_seconds": seconds, "rank_seconds": 2 * seconds}
                    sweep.finish(trial, value, metrics=metrics, **costs)
                    start = 30.0 * (index + 1)
                    sweep.losses(trial, [start * (0.3 + math.exp(-step / 40)) for step in range(1, 8 * budget)])


@pytest.fixture
def sweep(tmp_path: Path) -> FakeSweep:
    return FakeSweep(tmp_path)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> FakeSweep:
    """A complete study, for reading only."""
    made = FakeSweep(tmp_path_factory.mktemp("study"), name="embedding dimensions and budgets")
    add_study(made)
    made.write()
    return made
