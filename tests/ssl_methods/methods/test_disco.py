from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.backbones.tiny_vit import TinyViT
from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.distillation import distillation_loss
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.method import Progress
from ssl_methods.methods.disco import DisCo
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

NUM_SAMPLES = 8
STEP = Progress(step=1, total_steps=10, steps_per_epoch=5.0)


def build(backbone: type[Backbone] = TinyResNet, **knobs: Any) -> DisCo:
    torch.manual_seed(0)
    small = {
        "teacher": "tiny_resnet",
        "teacher_weights": "random",
        "teacher_hidden_dim": 24,
        "embed_dim": 16,
        "hidden_dim": 24,
        "queue_size": 32,
    }
    return DisCo(backbone(), **{**small, **knobs}).double()


def views_of(step: int = 0) -> list[Tensor]:
    """This rank's part of two views of 8 images."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(2, NUM_SAMPLES, 3, 12, 12, generator=generator, dtype=torch.float64)
    return [rank_slice(view, rank(), world_size()) for view in views]


def take_step(method: DisCo, step: int = 0) -> None:
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
    method(views_of(step)).loss.backward()
    optimizer.step()
    method.after_step(STEP)


def test_loss_is_the_weighted_sum_of_both_terms() -> None:
    method = build(distillation_weight=3.0, contrast_weight=0.5)
    other = copy.deepcopy(method)
    first, second = views_of()
    queries, others = (other.projector(other.backbone(view)) for view in (first, second))
    keys = other.contrast.projector(other.contrast.backbone(second))
    contrast = info_nce_loss(queries, keys, other.contrast.queue.negatives(), temperature=0.2).loss
    distances = distillation_loss(queries, other.teacher(first)) + distillation_loss(others, other.teacher(second))
    output = method([first, second])
    expected = float((3 * distances + 0.5 * contrast).detach())
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(output.metrics["distillation"]) == pytest.approx(float(distances.detach()), rel=1e-12)
    assert float(output.metrics["info_nce"]) == pytest.approx(float(contrast.detach()), rel=1e-12)
    assert torch.equal(method.contrast.queue.keys, build_queue(other, keys))


def build_queue(method: DisCo, keys: Tensor) -> Tensor:
    method.contrast.queue.enqueue(keys)
    return method.contrast.queue.keys


def test_d2_teacher_is_the_same_to_the_bit_after_training_steps() -> None:
    method = build()
    method.train()
    before = copy.deepcopy(method.teacher.state_dict())
    for step in range(3):
        take_step(method, step)
    assert all(value.grad is None for value in method.teacher.parameters())
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teachers_moments_move_in_training_mode_as_published() -> None:
    method = build(teacher_bn="train")
    method.train()
    before = copy.deepcopy(method.teacher.state_dict())
    take_step(method)
    moved = {name for name, value in method.teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= {name for name, _ in method.teacher.named_buffers()}


@pytest.mark.parametrize("contrast_weight", [0.0, 1.0])
def test_d3_gradient_comes_from_both_views_and_reaches_the_student_alone(contrast_weight: float) -> None:
    method = build(contrast_weight=contrast_weight)
    views = [view.requires_grad_() for view in views_of()]
    method(views).loss.backward()
    assert all(view.grad is not None and bool(view.grad.any()) for view in views)
    for name, value in method.named_parameters():
        assert (value.grad is None) == name.startswith(("contrast.", "teacher.")), name


def test_without_contrast_twin_and_queue_rest() -> None:
    method = build(contrast_weight=0.0)
    before = copy.deepcopy(method.contrast.state_dict())
    take_step(method)
    assert all(torch.equal(value, before[name]) for name, value in method.contrast.state_dict().items())
    output = method(views_of())
    assert "info_nce" not in output.metrics
    assert torch.equal(output.loss.detach(), 32 * output.metrics["distillation"])
    method.check_batches(num_views=2, global_batch=12)
    with pytest.raises(ValueError, match="queue_size: 32 is no multiple of the global batch of 12"):
        build().check_batches(num_views=2, global_batch=12)


def test_published_reduction_weighs_with_the_batch_of_a_rank() -> None:
    loss = float(build(reduction="published", distillation_weight=99.0)(views_of()).loss.detach())
    mean = float(build(distillation_weight=float(NUM_SAMPLES))(views_of()).loss.detach())
    assert loss == pytest.approx(mean, rel=1e-12)
    assert build().advice(global_batch=512, num_ranks=4) == ()
    assert build(reduction="published").advice(global_batch=256, num_ranks=8) == ()
    (line,) = build(reduction="published").advice(global_batch=256, num_ranks=2)
    assert "weighs distillation with the 128 images of a rank; published with 32" in line


def distilled_on_this_rank() -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of the patches without batch norm and contrast, for either reduction."""
    found = []
    for reduction, weight in (("mean", float(NUM_SAMPLES)), ("published", 1.0)):
        method = build(TinyViT, contrast_weight=0.0, reduction=reduction, distillation_weight=weight)
        loss = method(views_of()).loss
        loss.backward()
        gradient = method.backbone.get_parameter("patches.weight").grad
        assert gradient is not None
        found.append((loss.detach(), gradient))
    return found


def test_d7_mean_is_free_of_the_rank_count_and_the_published_sum_is_not() -> None:
    whole = distilled_on_this_rank()
    assert float(whole[0][0]) == pytest.approx(float(whole[1][0]), rel=1e-12)
    ranks = run_on_ranks(2, distilled_on_this_rank)
    for index, share in ((0, 1.0), (1, 0.5)):
        value, gradient = whole[index]
        for results in ranks:
            torch.testing.assert_close(results[index][0], share * value, rtol=1e-10, atol=0)  # float64, other order
        average = torch.stack([results[index][1] for results in ranks]).mean(0)
        torch.testing.assert_close(average, share * gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("hidden_dim", [0, 512, 2048])
def test_d9_head_has_the_parameters_of_its_width(hidden_dim: int) -> None:
    projector = DisCo(TinyResNet(), teacher_weights="random", teacher="tiny_resnet", hidden_dim=hidden_dim).projector
    count = sum(value.numel() for value in projector.parameters())
    width, output = TinyResNet().embed_dim, 128
    two_layers = width * hidden_dim + hidden_dim + output * hidden_dim + output
    assert count == (two_layers if hidden_dim else width * output + output)


def test_student_starts_as_under_moco_whatever_the_teacher() -> None:
    first, second = build(), build(teacher="tiny_vit", teacher_hidden_dim=48)
    for part in ("backbone", "projector", "contrast"):
        states = (getattr(method, part).state_dict() for method in (first, second))
        assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


def test_teacher_of_an_earlier_trial_is_loaded_without_its_queue(tmp_path: Path) -> None:
    earlier = build(queue_size=16)
    take_step(earlier)
    file = tmp_path / "weights.safetensors"
    save_file(earlier.state_dict(), file)
    method = build(teacher_weights=str(file))
    assert method.pretrained() == {"teacher_weights": str(file)}
    with pytest.raises(RuntimeError, match=r"teacher_weights: .*not loaded"):
        method(views_of())
    student = copy.deepcopy({name: value for name, value in method.state_dict().items() if "teacher." not in name})
    method.load_pretrained(lambda _: None)
    for part in ("backbone", "projector"):
        taught = getattr(method.teacher, part).state_dict()
        for name, value in getattr(earlier, part).state_dict().items():
            assert torch.equal(taught[name], value), name
    assert all(torch.equal(method.state_dict()[name], value) for name, value in student.items())


def test_untrained_teacher_needs_no_file() -> None:
    method = build()
    assert method.pretrained() == {}
    method.load_pretrained(lambda _: None)


def test_defaults_are_the_published_ones() -> None:
    method = DisCo(TinyResNet(), teacher_weights="random")
    layers = [layer.weight.shape for layer in method.projector if isinstance(layer, nn.Linear)]
    assert layers == [(2048, 128), (128, 2048)]
    taught = [value.shape for value in method.teacher.projector.parameters()]
    assert taught == [(2048, 2048), (2048,), (128, 2048), (128,)]
    assert method.contrast.queue.keys.shape == (65536, 128)
    assert (method.contrast.momentum, method.contrast.temperature) == (0.999, 0.2)
    assert (method.distillation_weight, method.contrast_weight) == (32.0, 1.0)
