from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.collectives import RankBatchNorm
from ssl_methods.methods.simsiam import SimSiam

VIEWS = list(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def build(**knobs: Any) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(TinyResNet(), embed_dim=16, hidden_dim=24, bottleneck_dim=8, **knobs).double()


def loss_by_hand(method: SimSiam, *, stop: bool) -> Tensor:
    """Equation 4 of the paper, or equation 2, which has no stop-gradient."""
    z1, z2 = (method.projector(method.backbone(view)) for view in VIEWS)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    goals = (z2.detach(), z1.detach()) if stop else (z2, z1)
    similarities = [F.cosine_similarity(p, z).mean() for p, z in zip((p1, p2), goals, strict=True)]
    loss: Tensor = -(similarities[0] + similarities[1]) / 2
    return loss


def gradients_of(method: SimSiam, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*method.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_value_and_gradient_are_those_with_a_stopped_target() -> None:
    method = build()
    loss, expected = method(VIEWS).loss, loss_by_hand(method, stop=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    found, goals = gradients_of(method, loss), gradients_of(method, expected)
    for name, gradient in goals.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    unstopped = gradients_of(method, loss_by_hand(method, stop=False))
    weight = "projector.0.weight"
    assert float((found[weight] - unstopped[weight]).abs().max()) > 1e-3 * float(found[weight].abs().max())


def test_loss_lies_between_minus_one_and_one_and_counts_equal_predictions() -> None:
    method = build()
    method.predictor = nn.Identity()
    same = [VIEWS[0], VIEWS[0]]
    assert method(same).loss.item() == pytest.approx(-1, rel=1e-12)


def test_heads_are_the_published_ones() -> None:
    method = SimSiam(TinyResNet())
    widths = [tuple(layer.weight.shape) for layer in method.projector if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 128), (2048, 2048), (2048, 2048)]
    last = method.projector[-1]
    assert isinstance(last, RankBatchNorm) and not last.affine
    hidden, norm, _, output = method.predictor
    assert isinstance(hidden, nn.Linear) and isinstance(output, nn.Linear) and isinstance(norm, RankBatchNorm)
    assert (tuple(hidden.weight.shape), tuple(output.weight.shape)) == ((512, 2048), (2048, 512))
    assert hidden.bias is None and output.bias is not None


def test_each_view_has_its_own_moments() -> None:
    method = build()
    method(VIEWS)
    counts = {name: int(value) for name, value in method.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {2}
