from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_binary import TinyBinary
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.binary import binary_convolutions
from ssl_methods.losses.guided import guided_loss
from ssl_methods.method import Progress
from ssl_methods.methods.s2_bnn import S2BNN

SMALL = {
    "embed_dim": 16,
    "hidden_dim": 24,
    "queue_size": 32,
    "teacher": "tiny_resnet",
    "teacher_hidden_dim": 24,
    "teacher_weights": "random",
}


def build(backbone: type[Backbone] = TinyBinary, **knobs: Any) -> S2BNN:
    torch.manual_seed(0)
    return S2BNN(backbone(), **{**SMALL, **knobs})


def views_of(step: int = 0, *, num_views: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(num_views, 8, 3, 12, 12, generator=generator))


def progress(step: int) -> Progress:
    return Progress(step=step, total_steps=8, steps_per_epoch=2.0, stage=int(step >= 4))


def train(method: S2BNN, *, steps: int, first: int = 0, num_views: int = 2) -> list[dict[str, float]]:
    """Take steps as the engine does, from a fresh optimizer; return what each logged."""
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-4)
    logged = []
    for step in range(first, first + steps):
        method.before_step(progress(step))
        output = method(views_of(step, num_views=num_views))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(progress(step + 1))
        logged.append({"loss": output.loss.item(), **{name: value.item() for name, value in output.metrics.items()}})
    return logged


def switches(method: S2BNN) -> set[bool]:
    """Whether the weights are binary, in the student and in its twin."""
    networks = (method.backbone, method.contrast.backbone)
    return {bool(layer.binary) for network in networks for _, layer in binary_convolutions(network)}


def test_s4_both_stages_have_the_same_names_and_shapes_and_stages_set_the_switch() -> None:
    method = build()
    shapes = {name: value.shape for name, value in method.state_dict().items()}
    assert (method.num_stages, switches(method)) == (2, {False})
    method.before_step(progress(4))
    assert switches(method) == {True}
    assert {name: value.shape for name, value in method.state_dict().items()} == shapes
    method.before_step(progress(3))
    assert switches(method) == {False}  # a pure function of the progress


def test_restored_student_uses_the_weights_of_its_stage_without_another_step() -> None:
    method, restored = build(), build()
    method.before_step(progress(4))
    restored.load_state_dict(method.state_dict())
    images = views_of()[0]
    assert torch.equal(restored.encoder().eval()(images), method.encoder().eval()(images))


def test_latent_weights_start_as_the_way_to_binary_weights_wants() -> None:
    for progressive in (True, False):
        weights = torch.cat([each.weight.flatten() for _, each in binary_convolutions(build(progressive=progressive))])
        assert float((weights < 0).float().mean()) == pytest.approx(0 if progressive else 0.5, abs=0.01)
        assert 0.99e-3 < float(weights.detach().abs().max()) <= 1e-3
    at_once = build(progressive=False)
    assert (at_once.num_stages, switches(at_once)) == (1, {True})
    at_once.before_step(progress(0))
    assert switches(at_once) == {True}


def test_s5_the_loss_is_that_of_student_and_teacher_on_the_same_view_and_the_teacher_stays() -> None:
    method = build().train()
    assert method.teacher is not None
    before = copy.deepcopy(method.teacher.state_dict())
    twin = copy.deepcopy(method)
    view = views_of()[0]
    expected = guided_loss(twin.projector(twin.backbone(view)), twin.teacher(view), temperature=0.2)
    output = method(views_of())
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.metrics["kl"], expected.divergence)
    assert float(output.metrics["kl"]) == pytest.approx(
        float(output.metrics["guided"] - output.metrics["teacher_entropy"]), abs=1e-5
    )
    train(method, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())


def test_s9_distillation_uses_one_view_and_leaves_twin_and_queue_as_they_were() -> None:
    method = build()
    before = copy.deepcopy(method.contrast.state_dict())
    weights = copy.deepcopy(method.backbone.state_dict())
    logged = train(method, steps=3, num_views=1)
    assert all(torch.equal(value, before[name]) for name, value in method.contrast.state_dict().items())
    assert not torch.equal(method.backbone.state_dict()["stem.0.weight"], weights["stem.0.weight"])
    assert train(build(), steps=3) == logged  # the second view changes nothing
    assert "info_nce" not in logged[0]


def test_modes_have_their_terms_and_their_sum_is_one_to_one() -> None:
    logged = {
        mode: train(build(mode=mode), steps=1)[0]
        for mode in ("contrastive", "distillation", "contrastive_distillation")
    }
    both = logged["contrastive_distillation"]
    assert logged["contrastive"]["loss"] == both["info_nce"]
    assert logged["distillation"]["loss"] == both["guided"]
    assert both["loss"] == pytest.approx(both["info_nce"] + both["guided"], rel=1e-6)  # fp32
    assert build(mode="contrastive", teacher_weights="").teacher is None
    moved = build(mode="contrastive", momentum=0.5)
    before = copy.deepcopy(moved.contrast.state_dict())
    train(moved, steps=1)
    assert int(moved.contrast.queue.position) == 8
    name = "backbone.stem.0.weight"
    expected = (before[name] + moved.backbone.state_dict()["stem.0.weight"]) / 2
    torch.testing.assert_close(moved.contrast.state_dict()[name], expected)


def test_flips_of_a_step_are_logged_by_the_next_and_survive_a_restart() -> None:
    method = build(progressive=False)
    logged = train(method, steps=2)
    # Adam moves each weight by its learning rate of 3e-4 at first: half of the weights that lie within it cross zero
    assert logged[0]["sign_flip_rate"] == 0
    assert 0.1 < logged[1]["sign_flip_rate"] < 0.2
    assert logged[1]["saturated_fraction"] == 0
    restored = build(progressive=False)
    restored.load_state_dict(copy.deepcopy(method.state_dict()))
    again = train(restored, steps=2, first=2)
    assert again == train(method, steps=2, first=2)
    assert again[0]["sign_flip_rate"] > 0


def test_interrupted_training_of_two_stages_equals_one_that_was_not() -> None:
    whole, part = build(mode="contrastive_distillation"), build(mode="contrastive_distillation")
    train(whole, steps=3)
    expected = train(whole, steps=3, first=3)
    train(part, steps=3)
    restored = build(mode="contrastive_distillation")
    restored.load_state_dict(copy.deepcopy(part.state_dict()))
    assert train(restored, steps=3, first=3) == expected


def test_a_real_student_is_distilled_in_one_stage_and_says_so() -> None:
    method = build(TinyResNet)
    assert method.num_stages == 1
    assert "real network is trained, in one stage" in method.advice(global_batch=256, num_ranks=8)[0]
    first, *_, last = train(method, steps=4)
    assert last["kl"] < first["kl"]
    assert "sign_flip_rate" not in first


def test_advice_compares_the_images_of_a_rank() -> None:
    method = build()
    assert method.advice(global_batch=256, num_ranks=8) == ()
    assert method.advice(global_batch=256, num_ranks=2) == ()
    (line,) = method.advice(global_batch=1024, num_ranks=1)
    assert line == "batch norm sees 1024 images on each of 1 ranks; published with 32, 256 on 8 ranks"


def test_batches_are_checked_where_keys_are_made() -> None:
    build().check_batches(num_views=1, global_batch=12)
    method = build(mode="contrastive")
    method.check_batches(num_views=2, global_batch=16)
    with pytest.raises(ValueError, match="queue_size: 32 is no multiple of the global batch of 12"):
        method.check_batches(num_views=2, global_batch=12)
    with pytest.raises(ValueError, match="views: mode contrastive takes 2, the recipe makes 1"):
        method.check_batches(num_views=1, global_batch=16)


def test_missing_weights_of_the_teacher_are_an_error_before_and_after_the_start() -> None:
    method = build(teacher_weights="/nowhere/teacher.pth")
    assert method.pretrained() == {"teacher_weights": "/nowhere/teacher.pth"}
    with pytest.raises(ValueError, match=r"teacher_weights: /nowhere/teacher\.pth"):
        method.load_pretrained()
    with pytest.raises(RuntimeError, match="not loaded"):
        method(views_of())
    assert build(mode="contrastive", teacher_weights="").pretrained() == {}


def test_values_are_the_published_ones() -> None:
    with torch.device("meta"):
        method = S2BNN(TinyBinary(), teacher="tiny_resnet", teacher_weights="random", queue_size=64)
    assert (method.mode, method.progressive, method.distillation_temperature) == ("distillation", True, 0.2)
    assert [tuple(value.shape) for value in method.projector.parameters()] == [
        (1024, 128),
        (1024,),
        (128, 1024),
        (128,),
    ]
    assert (method.contrast.momentum, method.contrast.temperature) == (0.999, 0.2)
