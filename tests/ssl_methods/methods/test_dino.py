from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.losses.dino import dino_loss
from ssl_methods.method import Progress
from ssl_methods.methods.dino import Dino


def build(**knobs: Any) -> Dino:
    torch.manual_seed(0)
    return Dino(TinyResNet(), embed_dim=16, hidden_dim=24, output_dim=32, **knobs).double()


def views_of(*sides: int, batch: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]


def at(step: int) -> Progress:
    return Progress(step=step, total_steps=3000, steps_per_epoch=10.0)


def batches_seen(module: nn.Module) -> list[tuple[int, int]]:
    """Number of images and their side, for each pass from now on."""
    seen: list[tuple[int, int]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), inputs[0].shape[-1])))
    return seen


def test_teacher_sees_the_large_views_and_the_student_all_a_size_at_a_time() -> None:
    method = build()
    student, teacher = batches_seen(method.backbone), batches_seen(method.teacher_backbone)
    method(views_of(16, 16, 12, 12, 12))
    assert teacher == [(12, 16)]
    assert student == [(12, 16), (18, 12)]


def test_any_number_of_views_from_two_up_is_taken() -> None:
    method = build()
    for sides in ((12, 12), (12, 12, 8), (12,) * 6):
        assert bool(method(views_of(*sides)).loss.isfinite())
    message = "views: this method takes 2 large ones and any small ones, the recipe makes 1"
    with pytest.raises(ValueError, match=message):
        method(views_of(12))
    with pytest.raises(ValueError, match=message):
        method.check_batches(num_views=1, global_batch=6)
    method.check_batches(num_views=2, global_batch=6)


def test_teacher_starts_as_the_student() -> None:
    method = build()
    for student, teacher in ((method.backbone, method.teacher_backbone), (method.head, method.teacher_head)):
        mine, twins = student.state_dict(), teacher.state_dict()
        assert all(torch.equal(value, twins[name]) for name, value in mine.items())


def test_loss_uses_the_centre_of_the_step_before_and_then_moves_it() -> None:
    method, untouched = build(), build()
    views = views_of(12, 12, 8)
    large, small = torch.cat(views[:2]), views[2]
    logits = untouched.head(torch.cat([untouched.backbone(large), untouched.backbone(small)])).view(3, 6, 32)
    teacher = untouched.teacher_head(untouched.teacher_backbone(large)).view(2, 6, 32)
    centre = torch.linspace(-0.1, 0.1, 32, dtype=torch.float64)
    method.centre.copy_(centre)
    expected = dino_loss(logits, teacher, centre=centre, student_temperature=0.1, teacher_temperature=0.04).loss
    assert float(method(views).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    moved = 0.9 * centre + 0.1 * teacher.detach().view(12, 32).mean(dim=0)
    torch.testing.assert_close(method.centre, moved, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("step", "temperature", "momentum"),
    [(0, 0.04, 0.996), (100, 0.05, 0.99601), (300, 0.07, 0.9961), (1500, 0.07, 0.998), (3000, 0.07, 1.0)],
)
def test_temperature_and_momentum_follow_the_published_schedules(
    step: int, temperature: float, momentum: float
) -> None:
    method = build()
    method.before_step(at(step))
    assert method.teacher_temperature == pytest.approx(temperature, rel=1e-12)
    assert method.momentum == pytest.approx(momentum, abs=6e-6)  # given to five digits


def test_no_warm_up_means_the_final_temperature_at_once() -> None:
    assert build(temperature_warmup_epochs=0.0).teacher_temperature == 0.07


def test_teacher_follows_with_the_momentum_of_the_step() -> None:
    method = build()
    method.before_step(at(1500))
    torch.nn.init.ones_(method.backbone.get_parameter("stem.0.weight"))
    before = method.teacher_backbone.get_parameter("stem.0.weight").clone()
    method.after_step(at(1501))
    after = method.teacher_backbone.get_parameter("stem.0.weight")
    torch.testing.assert_close(after, 0.998 * before + 0.002, rtol=1e-9, atol=1e-12)


def test_the_teacher_is_what_is_evaluated() -> None:
    method = build()
    assert method.encoder() is method.teacher_backbone


def test_last_layer_is_the_students_directions() -> None:
    method = build()
    (directions,) = method.last_layer()
    assert directions is method.head.last_layer.weight
    assert directions.shape == (32, 16)


def test_head_has_no_batch_norm_and_the_published_widths() -> None:
    method = Dino(TinyResNet())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in method.head.modules())
    widths = [layer.weight.shape for layer in method.head.mlp if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 128), (2048, 2048), (256, 2048)]
    assert method.centre.shape == (65536,)
