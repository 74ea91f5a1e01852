import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrate.errors import ConfigError
from orchestrate.sweep.source import load_source
from tests.sweep.sweeps import NUM_SAMPLES, identity, write_sweep

Identity = tuple[str, int, tuple[str, ...]]


def refused(folder: Path, classes: Any = None, **changes: Any) -> str:
    """Return why a sweep whose top-level or base sections are changed is refused."""
    path = write_sweep(folder)
    values = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        (values["base"] if key in values["base"] else values)[key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))

    def look_up(url: str) -> Identity:
        return ("ab" * 32, NUM_SAMPLES, classes[Path(url).name]) if classes else identity(url)

    with pytest.raises(ConfigError) as caught:
        load_source(path, "sweep", identity=look_up)
    return str(caught.value)


def test_val_with_other_class_names_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    told = refused(tmp_path, classes={"train": ("cat", "dog", "owl"), "val": ("cat", "fox", "owl")})
    assert "study.yaml:5: data.val: " in told
    assert "class 1 is 'fox', of data.train 'dog'" in told
    assert f"orchestrate data pack SOURCE {tmp_path}/data/val --classes-from {tmp_path}/data/train" in told


def test_val_that_lacks_classes_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, classes={"train": ("cat", "dog", "owl"), "val": ("cat", "dog")})
    assert "has 2 classes, data.train has 3; the first that differs is 'owl'" in told


def test_warmup_as_long_as_the_budget_is_refused_in_any_unit(tmp_path: Path) -> None:
    told = refused(tmp_path, train={"global_batch": 8, "budget": "1ep", "warmup": "10step"})
    assert "train.warmup: '10step': takes 10 of the 10 steps of the budget of 1ep; write less" in told


DINO: dict[str, Any] = {"method": {"name": "dino"}, "views": {"name": "small_grey", "size": 28}}


@pytest.mark.parametrize(
    ("train", "optim", "told"),
    [
        ({"budget": "10step"}, {"freeze_last_layer": "2ep"}, "optim.freeze_last_layer: '2ep': takes 20 of the 10 st"),
        ({"budget": "10step"}, {"freeze_last_layer": "1ep"}, "optim.freeze_last_layer: '1ep': takes 10 of the 10 st"),
        (
            {"budget": "20step", "warmup": "1ep", "schedule": {"name": "wsd", "decay": "1.5ep"}},
            {},
            "train.schedule.decay: '1.5ep': takes, with a warm-up of 1ep, 25 of the 20 steps of the budget of 20step",
        ),
        (
            {"budget": "10step", "schedule": {"name": "step", "milestones": ["0.5ep", "1ep"]}},
            {},
            "train.schedule.milestones.1: '1ep': takes 10 of the 10 steps of the budget of 10step; write less",
        ),
    ],
)
def test_lengths_in_other_units_than_the_budget_are_compared_in_steps(
    train: dict[str, Any], optim: dict[str, Any], told: str, tmp_path: Path
) -> None:
    changes = {"train": {"global_batch": 8, **train}, "optim": {"name": "adamw", "lr": 0.001, **optim}}
    assert told in refused(tmp_path, **DINO, **changes)


def test_lengths_that_fill_a_budget_but_for_rounding_pass(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    values = yaml.safe_load(path.read_text())
    schedule = {"name": "wsd", "decay": "95%"}  # 14.25 of 15 steps; the warm-up takes 0.75
    values["base"]["train"] = {"global_batch": 8, "budget": "15step", "warmup": "0.075ep", "schedule": schedule}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert len(load_source(path, "sweep", identity=identity).trials) == 2


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"train.seed": [0], "train.seed,train.budget": [[0, "1ep"]]}, "`train.seed` is on two axes; the other is `tr"),
        ({"train.seed, train.seed": [[0, 1]]}, "space.train.seed, train.seed: names `train.seed` twice"),
        ({"": [0]}, "space.: names no key; write a key such as `train.seed`"),
        ({"train.seed,": [[0, 1]]}, "space.train.seed,: names no key"),
        ({"train..seed": [0]}, "space.train..seed: names no key"),
        ({"train.seed": []}, "space.train.seed: has no values; write at least one, or remove the axis"),
        ({"train.seed": 3}, "space.train.seed: 3: must be a list"),
        ({"train.seed,train.budget": [[0]]}, "space.train.seed,train.budget.0: [0]: must be a list of 2 values"),
    ],
)
def test_axes_that_cannot_be_meant_are_refused_with_their_line(
    space: dict[str, Any], told: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, space=space)
    assert told in message
    assert "study.yaml:1:" not in message


def test_key_below_another_one_may_have_its_own_axis(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["space"] = {"method.embed_dim": [8, 16], "method": [{"name": "simclr"}, {"name": "barlow_twins"}]}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert [trial.config.method.params["embed_dim"] for trial in load_source(path, "sweep").trials] == [8, 8, 16, 16]


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ({"name": "grid", "seed": 1}, "strategy.seed: unknown key"),
        ({"name": ["grid"]}, "strategy.name: ['grid']: no such strategy"),
        ({}, "strategy.name: missing; one of grid"),
        ("grid", "strategy: 'grid': must be a mapping; write `{name: grid}`"),
    ],
)
def test_strategy_is_checked_like_every_section(strategy: Any, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, strategy=strategy)


def test_all_problems_of_a_sweep_file_are_told_at_once(tmp_path: Path) -> None:
    told = refused(
        tmp_path, name="no spaces please", strategy={"name": "gird"}, space={"": []}, limits=3, objective="knn"
    )
    assert "name: 'no spaces please': must be letters, digits" in told
    assert "limits: 3: must be a mapping of keys, such as `{parallel: ...}`" in told
    assert "objective: 'knn': must be a mapping of keys, such as `{metric: ...}`" in told
    assert len(told.splitlines()) == 5


def test_large_sweep_is_expanded_in_seconds(tmp_path: Path) -> None:
    # Networks are built once for all trials that share them; a build for each trial would take minutes.
    path = write_sweep(tmp_path, seeds=range(1000))
    before = time.process_time()
    assert len(load_source(path, "sweep", identity=identity).trials) == 1000
    assert time.process_time() - before < 20
