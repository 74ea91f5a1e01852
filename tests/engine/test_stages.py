"""A training of two stages, as the trainer runs it: what a stage begins with, and a resume where the two meet."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrate.config.run import RunConfig, parse_run
from orchestrate.data.index import dataset_identity
from orchestrate.engine.methods import build_method, check_batches, load_pretrained
from orchestrate.engine.snapshot import unflatten
from orchestrate.engine.startup import Startup
from orchestrate.engine.trainer import Trainer
from orchestrate.engine.watch import Heartbeat, StopWatch
from orchestrate.errors import ConfigError
from orchestrate.runs import RunDir, create_run_dir
from orchestrate.sweep.space import pin
from ssl_methods.views import recipe
from tests.config.methods import staged_method_installed
from tests.datasets import make_shapes
from tests.engine.trials import engine_of, this_rank

NUM_SAMPLES, TOTAL_STEPS, SECOND_STAGE = 40, 6, 3


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[RunConfig]:
    """A config whose method begins with the number in `target` and turns to its second stage at half time."""
    make_shapes(tmp_path / "train", NUM_SAMPLES)
    make_shapes(tmp_path / "val", 8, split="val")
    (tmp_path / "target").write_text("0.5")
    values: dict[str, Any] = {
        "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")},
        "method": {"name": "staged", "target": str(tmp_path / "target"), "most_ranks": 2},
        "backbone": {"name": "tiny_resnet"},
        "views": {"name": "small_grey", "size": 28},
        "optim": {"name": "adam", "lr": 0.01, "weight_decay": 1e-4},
        "train": {
            "global_batch": 8,
            "budget": f"{TOTAL_STEPS}step",
            "stages": {"starts": ["50%"], "optimizer": "reset", "schedule": "restart"},
        },
        "system": {"engine": "ddp", "checkpoint_every": f"{SECOND_STAGE}step", "workers": 0},
    }
    with staged_method_installed(tmp_path):
        config, problems = parse_run(values)
        assert config is not None, problems
        yield pin(config, dataset_identity)[0]


def train(config: RunConfig, folder: Path, *, checkpoint: Path | None = None) -> tuple[RunDir, list[str]]:
    """Train to the end, from a checkpoint if one is given; return the RunDir and what was said."""
    run = create_run_dir(folder / config.fingerprint(), config.to_yaml())
    if checkpoint is not None:
        shutil.copytree(checkpoint, run.checkpoints / checkpoint.name)
    said: list[str] = []
    trainer = Trainer(
        config,
        run,
        ranks=this_rank(),
        engine=engine_of(config),
        recipe=recipe(config.views.name, config.views.size),
        num_samples=NUM_SAMPLES,
        stop=StopWatch(None),
        heartbeat=Heartbeat(lambda facts: None),
        startup=Startup(),
        say=said.append,
    )
    assert trainer.train()
    return run, said


def logged(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


@pytest.mark.usefixtures("one_rank")
def test_resume_where_two_stages_meet_is_exact_and_needs_no_file_to_begin_with(
    staged: RunConfig, tmp_path: Path
) -> None:
    whole, said = train(staged, tmp_path / "whole")
    steps = logged(whole)
    assert [row["stage"] for row in steps] == [0, 0, 0, 1, 1, 1]
    assert [row["lr"] for row in steps[:SECOND_STAGE]] == [row["lr"] for row in steps[SECOND_STAGE:]]  # begun anew
    assert sum("target: " in line and "loaded" in line for line in said) == 1
    boundary, end = sorted(whole.checkpoints.glob("step-*"))
    assert load_file(end / "model.safetensors")["target"] == 0.5
    for path in (boundary, end):
        state = unflatten(load_file(path / "optimizer.safetensors"))
        assert {float(each["step"]) for each in state.values()} == {3.0}  # Adam's own count, which began again

    (tmp_path / "target").unlink()
    resumed, said = train(staged, tmp_path / "resumed", checkpoint=boundary)
    assert not any("target" in line for line in said)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed.checkpoints / end.name / file).read_bytes() == (end / file).read_bytes(), file
    timeless = ("step", "loss", "lr", "batch", "stage")
    assert [[row[key] for key in timeless] for row in logged(resumed)] == [
        [row[key] for key in timeless] for row in steps[SECOND_STAGE:]
    ]


@pytest.mark.usefixtures("one_rank")
def test_file_that_is_gone_ends_a_training_that_begins_and_names_its_knob(staged: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "target").unlink()
    with pytest.raises(ConfigError, match=r"method\.target: .*: no such file"):
        load_pretrained(engine_of(staged), this_rank())


@pytest.mark.usefixtures("one_rank")
def test_batches_are_refused_and_advised_on_by_the_true_number_of_ranks(staged: RunConfig) -> None:
    method, said = build_method(staged), list[str]()
    check_batches(staged, method, this_rank(), said.append)
    assert said == ["advice: staged: was published with 4096 images a batch, not 8 on 1"]
    method.most_ranks = torch.tensor(0)
    with pytest.raises(ConfigError, match=r"method: staged: takes 0 ranks at most, not 1; start fewer"):
        check_batches(staged, method, this_rank(), said.append)
