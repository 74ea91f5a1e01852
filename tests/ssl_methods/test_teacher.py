from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_methods.backbones import build
from ssl_methods.methods.moco import MoCo
from ssl_methods.teacher import Teacher


def teacher_of(weights: str = "random", *, seed: int = 0, **knobs: Any) -> Teacher:
    torch.manual_seed(seed)
    return Teacher("tiny_resnet", **{"hidden_dim": 12, "embed_dim": 8, "weights": weights, **knobs})


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def save_method(file: Path) -> MoCo:
    torch.manual_seed(7)
    method = MoCo(build.build("tiny_resnet"), embed_dim=8, hidden_dim=12, queue_size=16)
    method([images(), images()])  # moves the running moments
    save_file(method.state_dict(), file)
    return method


def test_teacher_gives_the_embeddings_that_the_trained_method_gives(tmp_path: Path) -> None:
    method = save_method(tmp_path / "weights.safetensors").eval()
    teacher = teacher_of(str(tmp_path / "weights.safetensors"))
    said: list[str] = []
    teacher.load(said.append)
    assert torch.equal(teacher(images()), method.projector(method.backbone(images())))
    assert said[0].startswith(f"teacher_weights: {tmp_path}/weights.safetensors: a whole method: ")
    assert teacher.pretrained() == {"teacher_weights": str(tmp_path / "weights.safetensors")}


def test_teacher_without_weights_teaches_nothing() -> None:
    teacher = teacher_of("nowhere.pth")
    with pytest.raises(RuntimeError, match=r"teacher_weights: nowhere.pth: not loaded; call load_pretrained first"):
        teacher(images())
    with pytest.raises(ValueError, match=r"^teacher_weights: nowhere.pth: cannot be read"):
        teacher.load(print)
    with pytest.raises(RuntimeError, match="not loaded"):
        teacher(images())


def test_other_bytes_than_expected_are_refused(tmp_path: Path) -> None:
    save_method(tmp_path / "weights.safetensors")
    teacher = teacher_of(str(tmp_path / "weights.safetensors"), sha256=64 * "0")
    with pytest.raises(ValueError, match=f"^teacher_weights: .*SHA-256 is [0-9a-f]{{64}}, expected {64 * '0'}"):
        teacher.load(print)
    assert not teacher.loaded


def test_untrained_teacher_is_a_control_that_needs_no_file() -> None:
    teacher = teacher_of("random")
    said: list[str] = []
    before = copy.deepcopy(teacher.state_dict())
    teacher.load(said.append)
    assert said == ["teacher_weights: random: the teacher stays untrained, as a control"]
    assert teacher.pretrained() == {}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher(images()).shape == (4, 8)


def test_state_brings_weights_back_without_the_file(tmp_path: Path) -> None:
    save_method(tmp_path / "weights.safetensors")
    teacher = teacher_of(str(tmp_path / "weights.safetensors"))
    unloaded = copy.deepcopy(teacher.state_dict())
    teacher.load(lambda _: None)
    resumed = teacher_of("gone.safetensors", seed=3)
    resumed.load_state_dict(teacher.state_dict())
    assert torch.equal(resumed(images()), teacher(images()))
    resumed.load_state_dict(unloaded)
    with pytest.raises(RuntimeError, match="not loaded"):
        resumed(images())


def test_teacher_never_trains() -> None:
    parent = nn.Sequential(teacher_of())
    parent.train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(value.requires_grad for value in parent.parameters())
    before = copy.deepcopy(parent.state_dict())
    first = parent[0](images().requires_grad_())
    assert not first.requires_grad
    assert torch.equal(parent[0](images()), first)
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())


def test_batch_norm_in_training_mode_sees_the_batch_and_moves_its_moments() -> None:
    frozen, moving = teacher_of(), teacher_of(batch_norm="train")
    moving.train()
    assert [type(module) for module in moving.modules() if module.training] == [nn.BatchNorm2d] * 9
    before = copy.deepcopy(moving.state_dict())
    assert not torch.allclose(moving(images()), frozen(images()))
    changed = {name for name, value in moving.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("running_" in name or "num_batches" in name for name in changed)
    assert not any(module.training for module in moving.eval().modules())


def test_bare_features_must_have_the_embeddings_width() -> None:
    bare = teacher_of(hidden_dim=0, embed_dim=128)
    assert torch.equal(bare(images()), bare.backbone(images()))
    with pytest.raises(ValueError, match="teacher_hidden_dim: 0 takes the features of tiny_resnet, 128 wide, for embe"):
        teacher_of(hidden_dim=0)


def test_stem_is_that_of_the_teachers_backbone() -> None:
    teacher = Teacher("resnet18", hidden_dim=0, embed_dim=512, weights="random", stem="small")
    assert teacher.backbone.get_parameter("network.conv1.weight").shape == (64, 3, 3, 3)
    with pytest.raises(ValueError, match=r"^teacher: backbone 'tiny_resnet': stem 'small' is for torchvision ResNets"):
        teacher_of(stem="small")
