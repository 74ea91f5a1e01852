from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.method import Progress
from ssl_methods.methods.byol import BYOL

VIEWS = list(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def build(**knobs: Any) -> BYOL:
    torch.manual_seed(0)
    return BYOL(TinyResNet(), embed_dim=16, hidden_dim=24, **knobs).double()


def at(step: int) -> Progress:
    return Progress(step=step, total_steps=1000, steps_per_epoch=10.0)


def moved_twin() -> BYOL:
    """A method whose twin is no copy any more."""
    method = build()
    with torch.no_grad():
        for parameter in method.target_projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def test_twin_starts_as_a_copy() -> None:
    method = build()
    for mine, twin in ((method.backbone, method.target_backbone), (method.projector, method.target_projector)):
        state = twin.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())


def test_loss_sums_the_squared_distances_to_the_other_views_target() -> None:
    method, by_hand = moved_twin(), moved_twin()
    predictions = [by_hand.predictor(by_hand.projector(by_hand.backbone(view))) for view in VIEWS]
    targets = [by_hand.target_projector(by_hand.target_backbone(view)) for view in VIEWS]
    expected = sum(
        float((F.normalize(predictions[i]) - F.normalize(targets[1 - i])).square().sum(dim=1).mean().detach())
        for i in (0, 1)
    )
    output = method(VIEWS)
    assert output.loss.item() == pytest.approx(expected, rel=1e-10)
    assert float(output.metrics["target_similarity"]) == pytest.approx(1 - expected / 4, rel=1e-10)


def test_only_the_trained_network_gets_a_gradient() -> None:
    method = moved_twin()
    method(VIEWS).loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target_"), name


def test_each_view_has_its_own_moments_in_both_networks() -> None:
    method = build()
    method(VIEWS)
    counts = {name: int(value) for name, value in method.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {2}


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.996), (250, 0.996585786), (500, 0.998), (1000, 1.0)])
def test_momentum_grows_to_one_along_a_cosine(step: int, momentum: float) -> None:
    method = build()
    method.before_step(at(step))
    assert method.momentum == pytest.approx(momentum, abs=1e-9)


def test_twin_follows_a_still_network_as_momentum_says() -> None:
    method = moved_twin()
    twin, goal = method.target_projector[0].weight, method.projector[0].weight
    assert isinstance(twin, Tensor) and isinstance(goal, Tensor)
    expected = twin.detach().clone()
    for step in range(3):
        method.before_step(at(500 * step))
        method.after_step(at(500 * step + 1))
        share = (0.996, 0.998, 1.0)[step]
        expected = share * expected + (1 - share) * goal.detach()
    torch.testing.assert_close(twin.detach(), expected, rtol=1e-12, atol=1e-15)


def test_heads_have_the_published_widths() -> None:
    method = BYOL(TinyResNet())
    for head, input_dim in ((method.projector, 128), (method.predictor, 256)):
        assert [type(layer) for layer in head][::2] == [nn.Linear, nn.ReLU]
        widths = [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)]
        assert widths == [(4096, input_dim), (256, 4096)]


def test_small_batches_are_advised_against() -> None:
    assert "below 256" in build().advice(global_batch=128, num_ranks=1)[0]
    assert build().advice(global_batch=256, num_ranks=8) == ()
