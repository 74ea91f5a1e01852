from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrate.config.optim import AdamWConfig
from orchestrate.engine.optim import build_optimizer, parameter_groups, set_rates
from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.backbones.tiny_swin import TinySwin
from ssl_methods.losses.dino import dino_loss
from ssl_methods.losses.region import region_loss
from ssl_methods.method import Progress
from ssl_methods.methods.esvit import EsViT
from ssl_methods.multi_crop import NUM_LARGE

CLASSES = 32
ADAMW = AdamWConfig(name="adamw", lr=0.01, weight_decay=0.1)


def build(backbone: Backbone | None = None, **knobs: Any) -> EsViT:
    torch.manual_seed(0)
    chosen = {"embed_dim": 16, "hidden_dim": 24, "output_dim": CLASSES, **knobs}
    return EsViT(backbone or TinySwin(), **chosen).double()


def views_of(*sides: int, batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]


def at(step: int, *, stage: int = 0) -> Progress:
    return Progress(step=step, total_steps=3000, steps_per_epoch=10.0, stage=stage)


def take_steps(method: EsViT, optimizer: torch.optim.Optimizer, count: int, *, stage: int = 0) -> None:
    for step in range(count):
        method.before_step(at(step, stage=stage))
        optimizer.zero_grad()
        method(views_of(12, 12, 8)).loss.backward()
        optimizer.step()
        method.after_step(at(step + 1, stage=stage))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_loss_is_that_of_views_and_regions_under_the_centres_of_the_step_before() -> None:
    method, untouched = build(view_weight=0.3, region_weight=0.9), build()
    views = views_of(12, 12, 8)
    centres = torch.randn(2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 10
    for name, centre in zip(("centre", "region_centre"), centres, strict=True):
        getattr(method, name).copy_(centre)
    encoded = [untouched.backbone.encode(view) for view in views]
    head, region_head = untouched.heads["view"], untouched.heads["region"]
    large = [untouched.teacher_backbone.encode(view) for view in views[:2]]
    teacher = untouched.teacher_heads["view"](torch.cat([each.features for each in large])).view(2, 4, CLASSES)
    regions = untouched.teacher_heads["region"](torch.cat([each.tokens for each in large]).flatten(0, 1))
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    view = dino_loss(
        torch.stack([head(each.features) for each in encoded]), teacher, centre=centres[0], **temperatures
    ).loss
    region = region_loss(
        torch.cat([region_head(each.tokens.flatten(0, 1)) for each in encoded]),
        regions.view(2, 4, 9, CLASSES),
        student_features=[each.tokens for each in encoded],
        teacher_features=torch.stack([each.tokens for each in large]),
        centre=centres[1],
        **temperatures,
    ).loss
    output = method(views)
    assert float(output.loss.detach()) == pytest.approx(float((0.3 * view + 0.9 * region).detach()), rel=1e-12)
    assert float(output.metrics["view"]) == pytest.approx(float(view.detach()), rel=1e-12)
    assert float(output.metrics["region"]) == pytest.approx(float(region.detach()), rel=1e-12)
    # E7: each centre moves by a tenth towards the mean of the teacher's logits of that step
    for name, centre, logits in (("centre", centres[0], teacher), ("region_centre", centres[1], regions)):
        moved = 0.9 * centre + 0.1 * logits.detach().reshape(-1, CLASSES).mean(dim=0)
        torch.testing.assert_close(getattr(method, name), moved, rtol=1e-10, atol=1e-13)


def test_e1_uniform_distributions_cost_the_logarithm_of_the_number_of_classes() -> None:
    method = build(output_dim=65536, norm_last_layer=True)
    method(views_of(12, 12))  # the teacher before its layers are zeroed has moved the centres
    for head in (*method.heads.values(), *method.teacher_heads.values()):
        nn.init.zeros_(head.last_layer.weight)
    method.centre.zero_()
    method.region_centre.zero_()
    assert float(method(views_of(12, 12, 8)).loss.detach()) == pytest.approx(11.0904, abs=5e-5)


def test_e2_ten_crops_make_eighteen_pairs() -> None:
    """Were it divided by another number of pairs, copies of a crop would not cost the same as one."""
    method, other = build(), build()
    small = views_of(12, 12, 8)
    crops = [*small[:2], *small[2:] * 8]
    num_pairs = NUM_LARGE * (len(crops) - 1)
    assert num_pairs == 18
    few, many = (each(views).metrics["view"] for each, views in ((method, small), (other, crops)))
    pairs = build()(small[:2]).metrics["view"]
    # 4 pairs: two of large crops, and a small crop with each; 18 pairs: those two, and eight times the others
    assert float(18 * many) == pytest.approx(float(2 * pairs + 8 * (4 * few - 2 * pairs)), rel=1e-10)


def test_e5_teacher_starts_as_the_student_and_has_no_gradient() -> None:
    method = build()
    assert same(state(method.backbone), method.teacher_backbone)
    assert same(state(method.heads), method.teacher_heads)
    method(views_of(12, 12, 8)).loss.backward()
    teacher = (*method.teacher_backbone.parameters(), *method.teacher_heads.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher)


def test_e8_entropies_and_matches_are_logged_and_a_constant_input_without_centring_shows() -> None:
    method = build(centre_momentum=1.0)
    found = method(views_of(12, 12, 8)).metrics
    for name in ("teacher_entropy", "region_entropy"):
        assert 0 < float(found[name]) < math.log(CLASSES)
    assert {"teacher_imbalance", "region_imbalance", "distinct_matches", "embedding_std"} <= found.keys()
    for head in method.teacher_heads.values():
        head.last_layer.gain.fill_(30.0)  # a teacher that is sure of itself
    constant = [torch.ones_like(view) for view in views_of(12, 12, 8)]
    found = method(constant).metrics
    assert float(found["teacher_entropy"]) < 0.01 * math.log(CLASSES)
    assert float(found["teacher_imbalance"]) > 0.99 * math.log(CLASSES)
    assert float(found["embedding_std"]) < 1e-6


@pytest.mark.parametrize(
    ("epoch", "temperature", "momentum"), [(0, 0.04, 0.996), (10, 0.05, 0.99601), (150, 0.07, 0.998), (300, 0.07, 1.0)]
)
def test_e9_temperature_and_momentum_follow_the_published_schedules(
    epoch: int, temperature: float, momentum: float
) -> None:
    method = build()
    method.before_step(at(10 * epoch))
    assert method.teacher_temperature == pytest.approx(temperature, rel=1e-12)
    assert method.momentum == pytest.approx(momentum, abs=6e-6)  # given to five digits


def test_e9_vectors_never_decay_and_gains_and_positions_do() -> None:
    method = build()
    groups = parameter_groups(ADAMW, method, method.last_layer())
    decays = {id(parameter): group["decays"] for group in groups for parameter in group["params"]}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (parameter.ndim > 1), name
    assert decays[id(method.heads["view"].last_layer.gain)]
    assert decays[id(method.backbone.stages[0][0].attention.bias.table)]


def test_e10_last_layers_stay_while_frozen_and_move_afterwards() -> None:
    method = build()
    assert [tuple(each.shape) for each in method.last_layer()] == [(CLASSES, 16), (CLASSES, 1)] * 2
    optimizer = build_optimizer(ADAMW, method, global_batch=256, last_layer=method.last_layer())
    before = [each.detach().clone() for each in method.last_layer()]
    rest = state(method.backbone)
    set_rates(optimizer, lr_factor=1.0, weight_decay=0.1, frozen=True)
    take_steps(method, optimizer, 2)
    assert all(torch.equal(each, value) for each, value in zip(method.last_layer(), before, strict=True))
    assert not same(rest, method.backbone)
    set_rates(optimizer, lr_factor=1.0, weight_decay=0.1, frozen=False)
    take_steps(method, optimizer, 1)
    assert not any(torch.equal(each, value) for each, value in zip(method.last_layer(), before, strict=True))


def test_fixed_gains_leave_the_directions_as_all_there_is_to_freeze() -> None:
    assert [tuple(each.shape) for each in build(norm_last_layer=True).last_layer()] == [(CLASSES, 16)] * 2


def test_regions_that_wait_for_the_last_stage_leave_their_head_untouched_until_then() -> None:
    method = build(region="last_stage")
    assert method.num_stages == 2
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.5)
    before, centre = state(method.heads["region"]), method.region_centre.clone()
    alone = build(region="never")
    method.before_step(at(0))
    assert torch.equal(method(views_of(12, 12, 8)).loss, alone(views_of(12, 12, 8)).loss)  # weight 1, not view_weight
    take_steps(method, optimizer, 2)
    # as engines do that join parameters: no gradient counts as zero, and weights decay
    with torch.no_grad():
        for parameter in method.heads["region"].parameters():
            parameter.mul_(0.9)
    method.after_step(at(3))
    assert same(before, method.heads["region"])
    assert same(before, method.teacher_heads["region"])
    assert torch.equal(method.region_centre, centre)
    assert "region" not in method(views_of(12, 12, 8)).metrics
    take_steps(method, optimizer, 1, stage=1)
    assert not same(before, method.heads["region"])
    assert not same(before, method.teacher_heads["region"])
    assert not torch.equal(method.region_centre, centre)


def test_view_only_training_takes_any_backbone_and_has_one_head() -> None:
    class Bare(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.embed_dim = TinyResNet(), 128

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    method = build(Bare(), region="never")
    assert (method.num_stages, list(method.heads)) == (1, ["view"])
    assert set(method(views_of(12, 12, 8)).metrics).isdisjoint({"region", "region_entropy", "distinct_matches"})
    for region in ("always", "last_stage"):
        with pytest.raises(ValueError, match=rf"region: {region}: the backbone gives no .* write `region: never`, or"):
            build(Bare(), region=region)


def test_teacher_sees_the_large_views_and_the_student_all_a_size_at_a_time() -> None:
    method = build()
    seen: dict[str, list[tuple[int, int]]] = {"backbone": [], "teacher_backbone": []}
    for name, batches in seen.items():
        patches = getattr(method, name).patches
        patches.register_forward_pre_hook(lambda _, x, batches=batches: batches.append((len(x[0]), x[0].shape[-1])))
    method(views_of(16, 16, 12, 12, 12))
    assert seen == {"backbone": [(8, 16), (12, 12)], "teacher_backbone": [(8, 16)]}
    assert method.encoder() is method.teacher_backbone
    with pytest.raises(ValueError, match="takes 2 large ones and any small ones, the recipe makes 1"):
        method.check_batches(num_views=1, global_batch=8)


def test_small_batches_are_warned_of() -> None:
    method = build()
    assert method.advice(global_batch=512, num_ranks=16) == ()
    (line,) = method.advice(global_batch=64, num_ranks=1)
    assert line.startswith("global_batch 64: published with 512")
    assert build(momentum=0.9995).advice(global_batch=64, num_ranks=1) == ()
