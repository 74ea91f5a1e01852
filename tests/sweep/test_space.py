import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrate.errors import ConfigError, DataError
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
        (
            {"budget": "10step", "stages": {"starts": ["1ep"]}},
            {},
            "train.stages.starts.0: '1ep': takes 10 of the 10 steps of the budget of 10step; write less",
        ),
        (
            {"budget": "10step", "stages": {"starts": ["3%", "5%"]}},
            {},
            "train.stages.starts: '3%, 5%': leave a stage without a step of the 10 of the budget of 10step",
        ),
        (
            {"budget": "2ep", "warmup": "1ep", "stages": {"starts": ["80%"], "schedule": "restart"}},
            {},
            "train.warmup: '1ep': takes 10 of the 4 steps of the shortest stage, which each have their own; write less",
        ),
    ],
)
def test_lengths_in_other_units_than_the_budget_are_compared_in_steps(
    train: dict[str, Any], optim: dict[str, Any], told: str, tmp_path: Path
) -> None:
    changes = {"train": {"global_batch": 8, **train}, "optim": {"name": "adamw", "lr": 0.001, **optim}}
    assert told in refused(tmp_path, **DINO, **changes)


def stated_sizes(folder: Path, **data: Any) -> Path:
    path = write_sweep(folder, seeds=(0,))
    values = yaml.safe_load(path.read_text())
    values["base"]["data"] |= data
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def unreadable(url: str) -> Identity:
    raise DataError(f"{url}: access refused")


def test_plan_makes_do_with_stated_sizes_of_data_that_cannot_be_read(tmp_path: Path) -> None:
    unseen: dict[str, str] = {}
    path = stated_sizes(tmp_path, train_samples=800)
    (trial,) = load_source(path, "sweep", identity=unreadable, unseen=unseen).trials
    assert trial.total_steps == 100
    urls = [f"{tmp_path}/data/{split}" for split in ("train", "val")]
    assert unseen == {url: f"{url}: access refused" for url in urls}
    (seen,) = load_source(stated_sizes(tmp_path, train_samples=NUM_SAMPLES), "sweep", identity=identity).trials
    assert trial.id != seen.id


def test_stated_digests_give_data_that_cannot_be_read_its_true_trials(tmp_path: Path) -> None:
    (seen,) = load_source(stated_sizes(tmp_path), "sweep", identity=identity).trials
    digests = {"train_digest": "ab" * 32, "val_digest": "ab" * 32}
    path = stated_sizes(tmp_path, train_samples=NUM_SAMPLES, **digests)
    (trial,) = load_source(path, "sweep", identity=unreadable, unseen={}).trials
    assert (trial.id, trial.total_steps) == (seen.id, seen.total_steps)


@pytest.mark.parametrize(("unseen", "samples"), [(None, 800), ({}, 0)])
def test_data_that_cannot_be_read_is_refused_unless_sizes_are_stated_and_enough(
    unseen: dict[str, str] | None, samples: int, tmp_path: Path
) -> None:
    path = stated_sizes(tmp_path, train_samples=samples)
    with pytest.raises(ConfigError, match=r"data\.train: .*: access refused"):
        load_source(path, "sweep", identity=unreadable, unseen=unseen)


def test_lengths_are_compared_with_a_stated_size_without_any_data(tmp_path: Path) -> None:
    path = stated_sizes(tmp_path, train_samples=80)
    path.write_text(path.read_text().replace("budget: 1ep", "budget: 1ep\n    warmup: 10step"))
    with pytest.raises(ConfigError, match=r"train\.warmup: '10step': takes 10 of the 10 steps"):
        load_source(path, "sweep")


def test_stated_size_must_be_that_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_samples: 81: the dataset there has 80; write that number"):
        load_source(stated_sizes(tmp_path, train_samples=81), "sweep", identity=identity)


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


def test_guessed_number_of_classes_is_held_against_labels_only(tmp_path: Path) -> None:
    method = {"name": "triplet", "num_classes": 3, "deputy": "median"}
    told = refused(tmp_path, classes={"train": ("cat", "dog"), "val": ("cat", "dog")}, method=method)
    assert "method.num_classes: 3: data.train has 2 classes; write that number" in told
    told = refused(tmp_path, classes={"train": (), "val": ()}, method=method)
    assert "num_classes" not in told
    assert "has no labels, which the probes need" in told


def test_sections_of_one_name_are_told_apart_by_the_keys_that_differ(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    values = yaml.safe_load(path.read_text())
    wide, soft = ({"name": "simclr", "embed_dim": 8, "hidden_dim": 16, "temperature": each} for each in (0.1, 0.5))
    values["space"] = {
        "method, train.stages": [[wide, {}], [soft, {}], [{"name": "barlow_twins"}, {}]],
        "method.embed_dim": [4, 8],
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assignments = [trial.assignment for trial in load_source(path, "sweep", identity=identity).trials]
    assert assignments[1] == {"method": "simclr", "method.temperature": 0.1, "method.embed_dim": 8}
    assert list(assignments[1]) == ["method", "method.temperature", "method.embed_dim"]
    assert assignments[2] == {"method": "simclr", "method.temperature": 0.5, "method.embed_dim": 4}
    assert assignments[4] == {"method": "barlow_twins", "method.embed_dim": 4}
