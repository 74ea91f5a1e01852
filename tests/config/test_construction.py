from pathlib import Path
from typing import Any

import pytest

from orchestrate.config.construction import construction_problems
from orchestrate.config.load import Problem
from orchestrate.config.run import parse_run


def problems(
    backbone: dict[str, Any], size: int, *, system: Any = None, starts: tuple[str, ...] = (), **method: Any
) -> list[Problem]:
    values = {
        "data": {"train": "data/train", "val": "data/val"},
        "method": {"name": "simclr"} | method,
        "backbone": backbone,
        "views": {"name": "small_grey", "size": size},
        "optim": {"name": "adamw", "lr": 0.001},
        "train": {"global_batch": 8, "budget": "1ep", "stages": {"starts": list(starts)}},
        "system": system or {},
    }
    config, found = parse_run(values)
    assert config is not None, found
    return construction_problems(config)


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("tiny_resnet", "default", 28),
        ("resnet18", "small", 32),
        ("vit_b_16", "default", 224),
        ("vit_tiny_patch16_224", "default", 224),
        ("regnet_x_400mf", "default", 32),  # needs numbers to be built, which the check has none of
    ],
)
def test_networks_of_all_sources_pass(name: str, stem: str, size: int) -> None:
    assert problems({"name": name, "stem": stem}, size) == []


def test_stem_that_a_network_does_not_have_is_named() -> None:
    (problem,) = problems({"name": "tiny_resnet", "stem": "small"}, 28)
    assert problem.key == ("backbone", "stem")
    assert "stem 'small' is for torchvision ResNets; leave stem out" in problem.reason


def test_window_that_a_network_does_not_have_is_named() -> None:
    assert problems({"name": "tiny_swin", "window": 4}, 28) == []
    (problem,) = problems({"name": "tiny_resnet", "window": 4}, 28)
    assert problem.key == ("backbone", "window")
    assert "leave it out, or take cvt_tiny, tiny_swin, vil_tiny" in problem.reason


@pytest.mark.parametrize("name", ["vgg11", "vit_b_16", "vit_tiny_patch16_224"])
def test_views_that_a_network_cannot_take_are_named(name: str) -> None:
    (problem,) = problems({"name": name}, 28)
    assert problem.key == ("backbone", "name")
    assert "cannot take views of 28 pixels" in problem.reason
    assert "another `views.size`, or another backbone" in problem.reason


def test_method_that_cannot_be_built_is_named() -> None:
    (problem,) = problems({"name": "tiny_resnet"}, 28, embed_dim=10**12, hidden_dim=10**12)
    assert (problem.key, problem.value) == (("method",), "simclr")
    assert "cannot be built" in problem.reason


def test_micro_batches_of_a_network_with_batch_norm_are_refused_by_the_name_of_the_norm() -> None:
    (problem,) = problems({"name": "resnet18", "stem": "small"}, 32, system={"micro_batch": 8})
    assert problem.key == ("system", "micro_batch")
    assert "resnet18: network.bn1 (BatchNorm2d) sees the whole batch" in problem.reason


def test_micro_batches_of_a_network_without_batch_norm_pass() -> None:
    assert problems({"name": "vit_b_16"}, 224, system={"micro_batch": 8, "activation_checkpointing": True}) == []


def test_recomputing_blocks_of_a_network_without_blocks_is_refused() -> None:
    (problem,) = problems({"name": "alexnet"}, 224, system={"activation_checkpointing": True})
    assert "alexnet has no stack of blocks to recompute" in problem.reason


def test_queue_that_the_global_batch_does_not_divide_is_refused_with_a_size_that_fits() -> None:
    (problem,) = problems({"name": "tiny_resnet"}, 28, name="moco", queue_size=60)
    assert problem.key == ("method",)
    assert "60 is no multiple of the global batch of 8; write 56" in problem.reason


def test_zero_stage_3_of_a_method_with_own_parameters_is_refused(bare_method: str) -> None:
    backbone = {"name": "tiny_resnet"}
    assert problems(backbone, 28, name=bare_method, system={"zero_stage": 2}) == []
    (problem,) = problems(backbone, 28, name=bare_method, system={"zero_stage": 3})
    assert (problem.key, problem.value) == (("system", "zero_stage"), 3)
    assert "scale belongs to Bare itself, for which ZeRO 3 does not gather it" in problem.reason
    assert problems(backbone, 28, system={"zero_stage": 3}) == []


TINY = {"name": "tiny_resnet"}


def test_stages_are_as_many_as_the_method_has(staged_method: str) -> None:
    assert problems(TINY, 28, name=staged_method, starts=("50%",)) == []
    (problem,) = problems(TINY, 28, name=staged_method)
    assert (problem.key, problem.value) == (("train", "stages", "starts"), "none")
    assert "staged trains in 2 stages, of which the first begins by itself; write 1 in all" in problem.reason
    (problem,) = problems(TINY, 28, starts=("50%",))
    assert "simclr trains in 1 stage; leave `train.stages` out" in problem.reason


def test_weights_to_begin_with_that_are_not_here_are_refused(staged_method: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("1")
    two: dict[str, Any] = {"name": staged_method, "starts": ("50%",)}
    for path in ("random", str(tmp_path / "there"), f"file://{tmp_path}/there", "s3://bucket/not/looked/at"):
        assert problems(TINY, 28, **two, target=path) == []
    for path in (str(tmp_path / "gone"), f"file://{tmp_path}/gone"):
        (problem,) = problems(TINY, 28, **two, target=path)
        assert (problem.key, problem.value) == (("method", "target"), path)
        assert problem.reason.startswith("no such file; write the path or URL")
