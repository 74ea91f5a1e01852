from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.collectives import RankBatchNorm
from ssl_methods.losses.truncated_triplet import truncated_triplet_loss
from ssl_methods.method import Progress
from ssl_methods.methods.triplet import Triplet


class Means(Backbone):
    """The mean colour of an image, doubled; remembers the sides of what it saw, also as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 3
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.sides: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2] == images.shape[3]
        self.sides.append(images.shape[3])
        return self.scale * images.mean(dim=(2, 3))


def build(backbone: type[Backbone] = Means, **knobs: Any) -> Triplet:
    torch.manual_seed(0)
    small = {"embed_dim": 8, "hidden_dim": 12, "last_rank": 4}
    return Triplet(backbone(), **{**small, **knobs}).double()


def views_of(seed: int = 0, *, side: int = 28) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, *noise = torch.randn(3, 8, 3, side, side, generator=generator, dtype=torch.float64)
    return [images.mean(dim=(2, 3), keepdim=True) * 20 + each for each in noise]


def at(step: int) -> Progress:
    return Progress(step=step, total_steps=10, steps_per_epoch=5.0)


def test_loss_is_the_sum_of_both_directions_through_the_target() -> None:
    method = build(resolution_min_online=1.0, resolution_min_target=1.0)
    untouched = copy.deepcopy(method)
    first, second = views_of()
    online, target = untouched.backbone, untouched.target_backbone
    anchors = [untouched.predictor(untouched.projector(online(view))) for view in (first, second)]
    targets = [untouched.target_projector(target(view)) for view in (second, first)]
    expected = sum(
        float(truncated_triplet_loss(*each, first_rank=2, last_rank=4).loss.detach())
        for each in zip(anchors, targets, strict=True)
    )
    output = method([first, second])
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(output.metrics["loss_minus_constant"]) == pytest.approx(expected - 200, rel=1e-9)
    closed = 2 * (2 * output.metrics["deputy_similarity"] - 4 * output.metrics["positive_similarity"])
    assert float(output.metrics["loss_minus_constant"]) == pytest.approx(float(closed), rel=1e-9)
    assert float(output.metrics["active"]) == 1


def test_gradient_reaches_the_online_network_alone() -> None:
    method = build()
    method(views_of()).loss.backward()
    for name, value in method.named_parameters():
        assert (value.grad is None) == name.startswith("target_"), name


def test_resolutions_are_drawn_for_each_pass_and_follow_from_the_step() -> None:
    method = build()
    seen: list[tuple[int, ...]] = []
    for step in range(60):
        method.before_step(at(step))
        method(views_of())
        seen.append((*method.backbone.sides[-2:], *method.target_backbone.sides[-2:]))
    online, target = {side for each in seen for side in each[:2]}, {side for each in seen for side in each[2:]}
    assert online == set(range(12, 29))  # 96 of 224 px to all, here of 28
    assert target == set(range(16, 29))
    assert len(set(seen)) > 50
    method.before_step(at(7))
    method(views_of())
    assert (*method.backbone.sides[-2:], *method.target_backbone.sides[-2:]) == seen[7]


def test_published_resolutions_are_96_and_128_to_224_pixels() -> None:
    method = build()
    view = views_of(side=224)[0]
    for draw, expected in ((0.0, (96, 128)), (1 - 2**-32, (224, 224))):
        method._predict(view, draw)
        method._target(view, draw)
        assert (method.backbone.sides[-1], method.target_backbone.sides[-1]) == expected


def test_whole_resolutions_leave_views_as_they_are() -> None:
    method = build(resolution_min_online=1.0, resolution_min_target=1.0)
    for step in range(5):
        method.before_step(at(step))
        method(views_of())
    assert set(method.backbone.sides) == {28}


def test_t8_momentum_follows_a_cosine_to_one_and_moments_are_not_averaged() -> None:
    method = build(TinyResNet)
    for step, momentum in ((0, 0.99), (5, 0.995), (10, 1.0)):
        method.before_step(at(step))
        assert method.momentum == pytest.approx(momentum, rel=1e-12)
    method.before_step(at(3))
    expected = 1 - 0.01 * (1 + math.cos(math.pi * 0.3)) / 2
    assert method.momentum == pytest.approx(expected, rel=1e-12)
    for value in method.backbone.parameters():
        value.data.add_(1)
    for value in method.backbone.buffers():
        value.add_(1)
    before, buffers = ([each.clone() for each in values()] for values in both(method))
    method.after_step(at(4))
    online = (*method.backbone.parameters(), *method.projector.parameters())
    for old, value, goal in zip(before, both(method)[0](), online, strict=True):
        torch.testing.assert_close(value, expected * old + (1 - expected) * goal, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(old, value) for old, value in zip(buffers, both(method)[1](), strict=True))
    method.before_step(at(10))
    last = [value.clone() for value in both(method)[0]()]
    method.after_step(at(10))
    assert all(torch.equal(old, value) for old, value in zip(last, both(method)[0](), strict=True))


def both(method: Triplet) -> tuple[Any, Any]:
    """Functions that list the target's parameters and its buffers."""
    target = nn.ModuleList([method.target_backbone, method.target_projector])
    return lambda: list(target.parameters()), lambda: list(target.buffers())


def test_t9_accumulated_batches_move_the_target_once() -> None:
    method = build(TinyResNet, momentum=0.9)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    before = [value.clone() for value in both(method)[0]()]
    method.before_step(at(0))
    for part in range(3):
        (method(views_of(part)).loss / 3).backward()
    optimizer.step()
    assert all(torch.equal(old, value) for old, value in zip(before, both(method)[0](), strict=True))
    method.after_step(at(1))
    online = (*method.backbone.parameters(), *method.projector.parameters())
    for old, value, goal in zip(before, both(method)[0](), online, strict=True):
        torch.testing.assert_close(value, 0.9 * old + 0.1 * goal, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("knobs", "least"), [({}, 11), ({"deputy": "rank", "first_rank": 5}, 6), ({"deputy": "median"}, 2)]
)
def test_batch_with_too_few_negatives_is_refused_before_training(knobs: dict[str, Any], least: int) -> None:
    method = Triplet(Means(), embed_dim=8, hidden_dim=12, **knobs)
    method.check_batches(num_views=2, global_batch=4 * least, num_ranks=4)
    method.check_batches(num_views=2, global_batch=least)
    with pytest.raises(ValueError, match=f"global batch of {4 * least} or more, or fewer ranks"):
        method.check_batches(num_views=2, global_batch=4 * least - 1, num_ranks=4)


def test_deputies_take_their_ranks() -> None:
    assert build(first_rank=3, last_rank=5)._ranks(196) == (3, 5)
    assert build(deputy="rank", first_rank=5)._ranks(196) == (5, 5)
    assert build(deputy="median")._ranks(196) == (98, 98)
    assert build(deputy="rank", first_rank=20)._ranks(196) == (20, 20)
    with pytest.raises(ValueError, match="last_rank: 4 comes before first_rank 5"):
        build(first_rank=5)


def test_advice_names_a_rank_that_is_safe_for_the_classes() -> None:
    published = Triplet(Means(), embed_dim=8, hidden_dim=12)
    assert published.advice(global_batch=8 * 196, num_ranks=8) == ()
    assert published.advice(global_batch=4096, num_ranks=1)[0].startswith("negatives come from the 4096 images of a")
    (line,) = build(num_classes=10).advice(global_batch=512, num_ranks=2)
    assert "rank 2 of 255 negatives: of 10 balanced classes it is another class's with probability 0.00" in line
    assert "from rank 33 on" in line
    assert build(num_classes=10, deputy="median").advice(global_batch=512, num_ranks=2) == ()


def test_heads_are_the_published_ones() -> None:
    method = Triplet(Means())
    for head, input_dim in ((method.projector, 3), (method.predictor, 256)):
        first, norm, activation, last = head
        assert [type(layer) for layer in head] == [nn.Linear, RankBatchNorm, nn.ReLU, nn.Linear]
        assert (first.weight.shape, norm.num_features) == ((4096, input_dim), 4096)
        assert last.weight.shape == (256, 4096)
        assert isinstance(activation, nn.ReLU) and not first.bias.any() and not last.bias.any()
    assert float(method.projector[3].weight.detach().std()) == pytest.approx(
        math.sqrt(2 / 4096), rel=0.01
    )  # a million draws
    assert float(method.predictor[3].weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert (method.first_rank, method.last_rank, method.gamma, method.margin) == (2, 10, 2.0, 100.0)
