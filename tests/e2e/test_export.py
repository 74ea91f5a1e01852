"""The encoder of a trial that a worker trained, taken from its checkpoint and from its end."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from orchestrate.engine.export import export_encoder
from tests.e2e.test_worker import made_run, work


def test_encoder_of_a_worked_trial_is_exported(sweep_file: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path, sweep_file, train={"budget": "4step", "warmup": "1step"}, backbone={"name": "test_resnet"})
    result = work(run)
    assert result.returncode == 0, result.stderr
    done = export_encoder(run, tmp_path / "done", form="timm")
    last = export_encoder(run, tmp_path / "last", form="timm", checkpoint="newest")
    assert done.step == last.step == 4
    first, second = load_file(tmp_path / "done"), load_file(tmp_path / "last")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
