from pathlib import Path

import pytest
import yaml

from orchestrate.errors import ConfigError
from orchestrate.sweep.source import load_source, resolved
from orchestrate.sweep.strategies.grid import Grid
from tests.sweep.sweeps import identity, write_sweep


def run_file(folder: Path, name: str = "first try.yaml") -> Path:
    base = yaml.safe_load(write_sweep(folder).read_text())["base"]
    path = folder / name
    path.write_text(yaml.safe_dump(base))
    return path


def test_run_file_is_a_sweep_of_one_named_like_the_file(tmp_path: Path) -> None:
    source = load_source(run_file(tmp_path), "run", identity=identity)
    assert source.sweep.name == "first-try"
    (trial,) = source.trials
    assert (trial.assignment, trial.total_steps) == ({}, 10)


def test_run_and_sweep_of_the_same_config_are_the_same_trial(tmp_path: Path) -> None:
    run = load_source(run_file(tmp_path), "run", identity=identity)
    sweep = load_source(write_sweep(tmp_path, seeds=(0,)), "sweep", identity=identity)
    assert run.trials[0].id == sweep.trials[0].id


def test_problems_of_a_run_file_carry_its_lines(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    path.write_text(path.read_text().replace("global_batch: 8", "global_batch: eight"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "eight" in text)
    with pytest.raises(ConfigError, match=rf"first try.yaml:{line}: train.global_batch: 'eight'"):
        load_source(path, "run")


def test_file_of_no_kind_is_answered_with_what_each_kind_has(tmp_path: Path) -> None:
    (tmp_path / "what.yaml").write_text("hello: world\n")
    with pytest.raises(ConfigError, match="a sweep has `base`, a run `method`, a cluster `launcher`"):
        resolved(tmp_path / "what.yaml")


def test_grid_asks_for_every_combination_the_last_axis_fastest() -> None:
    points = Grid().ask({"a": [1, 2], "b,c": [[3, 4], [5, 6]]})
    assert [point.values for point in points] == [
        {"a": 1, "b": 3, "c": 4},
        {"a": 1, "b": 5, "c": 6},
        {"a": 2, "b": 3, "c": 4},
        {"a": 2, "b": 5, "c": 6},
    ]
