"""Binary encoders in a file that holds a bit a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrate.engine.export import Export, export_encoder
from orchestrate.engine.export_targets import run_recipe
from orchestrate.errors import ConfigError
from ssl_methods.binary import binarise_weights, binary_convolutions
from tests.engine.test_export import Trial, features_of, finish, trial_of

METHOD = {"name": "s2_bnn", "mode": "contrastive", "embed_dim": 8, "hidden_dim": 16, "queue_size": 16}


def binary_trial(folder: Path, **knobs: Any) -> Trial:
    return trial_of(folder, "tiny_binary", size=28, method={**METHOD, "progressive": False, **knobs})


def export(trial: Trial, out: Path) -> Export:
    return export_encoder(finish(trial), out, form="packed")


def test_packed_encoder_has_the_features_of_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = binary_trial(tmp_path / "runs")
    out = tmp_path / "encoder.safetensors"
    exported = export(trial, out)
    monkeypatch.chdir(tmp_path)
    record = json.loads((tmp_path / "encoder.safetensors.json").read_text())
    there = run_recipe(record["recipe"])  # as a user would, beside the file
    assert torch.equal(features_of(there, 28), features_of(trial.method.encoder(), 28))  # type: ignore[arg-type]
    assert features_of(trial.method.encoder(), 28).std() > 0.01
    assert (exported.max_abs_difference, exported.zeros, exported.report.unexpected) == (0, 0, ())
    assert "unpack(load_file('encoder.safetensors'))" in exported.recipe
    num_weights = sum(layer.weight.numel() for _, layer in binary_convolutions(trial.method.encoder()))
    assert out.stat().st_size < num_weights / 8 + 45_000  # the real parts, and the header's names
    assert out.stat().st_size < sum(value.nbytes for value in trial.method.encoder().state_dict().values()) / 10


def test_weights_of_zero_become_positive_and_are_told(tmp_path: Path) -> None:
    trial = binary_trial(tmp_path / "runs")
    layer = dict(binary_convolutions(trial.method.encoder()))["blocks.1.conv"]
    with torch.no_grad():
        layer.weight[:, :2] = 0
    exported = export(trial, tmp_path / "file")
    assert exported.zeros == layer.weight[:, :2].numel() > 0
    assert f"\n  {exported.zeros} binary weights that were 0 became positive, there and here" in exported.text()
    signs = load_file(tmp_path / "file")["blocks.1.conv.signs"]
    assert torch.equal(signs[:, 0], torch.full_like(signs[:, 0], 255))


@pytest.mark.parametrize("first_stage", [True, False])
def test_encoders_that_are_not_binary_are_answered_with_what_fits(first_stage: bool, tmp_path: Path) -> None:
    trial = binary_trial(tmp_path / "runs") if first_stage else trial_of(tmp_path / "runs", "tiny_resnet", size=28)
    binarise_weights(trial.method, False)
    reason = r"not binary yet: the training is in its first stage" if first_stage else "has no binary convolution"
    with pytest.raises(ConfigError, match=f"--format packed: .*{reason}; use --format safetensors$"):
        export(trial, tmp_path / "file")


def test_other_libraries_are_answered_with_both_of_our_formats(tmp_path: Path) -> None:
    run = finish(binary_trial(tmp_path / "runs"))
    with pytest.raises(ConfigError, match="tiny_binary is no network of timm; use --format safetensors or packed"):
        export_encoder(run, tmp_path / "file", form="timm")
