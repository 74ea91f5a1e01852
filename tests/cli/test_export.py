"""The export of a trial that is named by a word, as other commands name it."""

import json
from pathlib import Path

import pytest

from orchestrate.config.run import load_run
from orchestrate.engine.checkpoint import save_weights
from orchestrate.engine.methods import build_method
from orchestrate.runs import RunDir, read_json, write_json
from tests.cli.commands import RUNS, finished_sweep, orchestrate


@pytest.fixture
def trials(place: Path) -> list[str]:
    """Two finished trials, the first with the weights that a worker leaves."""
    record, _ = finished_sweep(place, {"*": "done"})
    run = RunDir(RUNS / "trials" / record.trial_ids[0])
    sha256 = save_weights(build_method(load_run(run.config_file)), run.weights_file)
    write_json(run.done_file, {**(read_json(run.done_file) or {}), "weights_sha256": sha256})
    return list(record.trial_ids)


def test_export_finds_the_trial_by_the_beginning_of_its_id_and_says_how_to_load_it(trials: list[str]) -> None:
    result = orchestrate("export", trials[0][:6], "--format", "safetensors", "--out", "encoder.safetensors")
    assert result.exit_code == 0, result.output
    assert f"tiny_resnet of trial {trials[0]} (simclr) after step 10" in result.stdout
    assert "max abs difference 0, relative 0" in result.stdout
    assert "load_state_dict(load_file('encoder.safetensors'), strict=True)" in result.stdout
    assert Path("encoder.safetensors").is_file()


def test_export_tells_programs_what_it_writes_beside_the_file(trials: list[str]) -> None:
    result = orchestrate("export", trials[0], "--format", "safetensors", "--out", "file", "--json")
    assert json.loads(result.stdout) == json.loads(Path("file.json").read_text())


def test_export_that_cannot_be_is_one_message(trials: list[str]) -> None:
    def refused(*words: str) -> str:
        result = orchestrate("export", *words, "--out", "file")
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output
        assert not Path("file").exists()
        return result.stderr

    assert "use --format safetensors" in refused(trials[0], "--format", "torchvision")
    assert "weights.safetensors: is missing" in refused(trials[1], "--format", "safetensors")
    assert "--checkpoint 3: no whole one" in refused(trials[0], "--format", "safetensors", "--checkpoint", "3")
    assert "a sweep of 2 trials; name one of them" in refused("study", "--format", "safetensors")
    assert "torchvision" in refused(trials[0], "--format", "onnx")
