from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.swav import sinkhorn, swav_loss
from ssl_methods.method import Progress
from ssl_methods.methods.swav import SwAV
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

BATCH = 8
SIDES = (12, 12, 8, 8)


def build(**knobs: Any) -> SwAV:
    torch.manual_seed(0)
    return SwAV(TinyResNet(), embed_dim=6, hidden_dim=24, num_prototypes=10, **knobs).double()


def views_of(*sides: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]


def at_epoch(epoch: float) -> Progress:
    return Progress(step=round(10 * epoch), total_steps=1000, steps_per_epoch=10.0)


def batches_seen(module: nn.Module) -> list[tuple[int, int]]:
    """Number of images and their side, for each pass from now on."""
    seen: list[tuple[int, int]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), inputs[0].shape[-1])))
    return seen


def embed(method: SwAV, views: list[Tensor]) -> Tensor:
    """Unit embeddings of views of two sizes, view by view."""
    features = torch.cat([method.backbone(torch.cat(views[:2])), method.backbone(torch.cat(views[2:]))])
    return F.normalize(method.projector(features), dim=1).view(len(views), BATCH, -1)


def test_crops_go_through_a_size_at_a_time_and_only_large_ones_get_codes() -> None:
    method, by_hand = build(), build()
    seen = batches_seen(method.backbone)
    loss = method(views_of(*SIDES)).loss
    assert seen == [(2 * BATCH, 12), (2 * BATCH, 8)]
    scores = embed(by_hand, views_of(*SIDES)) @ F.normalize(by_hand.prototypes.weight, dim=1).T
    codes = sinkhorn(scores[:2], epsilon=0.05, iterations=3)
    assert loss.item() == pytest.approx(swav_loss(scores, codes, temperature=0.1).item(), rel=1e-10)


def test_queue_is_filled_from_its_epoch_on_and_used_once_full() -> None:
    method = build(queue_size=2 * BATCH, queue_from_epoch=15.0)
    before = copy.deepcopy(method.state_dict())
    method.before_step(at_epoch(14.9))
    method(views_of(*SIDES))
    assert int(method.num_queued) == 0
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items() if "queue" in name)
    method.before_step(at_epoch(15))
    stored = []
    for step in range(4):
        by_hand = copy.deepcopy(method)
        embeddings = embed(by_hand, views_of(*SIDES, seed=step))
        prototypes = F.normalize(by_hand.prototypes.weight, dim=1)
        scores = embeddings @ prototypes.T
        rows = scores[:2]
        if step >= 2:  # two steps have filled it
            rows = torch.cat([rows, torch.cat(stored[step - 2 :], dim=1) @ prototypes.T], dim=1)
        codes = sinkhorn(rows, epsilon=0.05, iterations=3)[:, :BATCH]
        expected = swav_loss(scores, codes, temperature=0.1).item()
        assert method(views_of(*SIDES, seed=step)).loss.item() == pytest.approx(expected, rel=1e-9), step
        stored.append(embeddings[:2].detach())
    assert int(method.num_queued) == 2 * BATCH


def test_restored_queue_goes_on() -> None:
    method, restored = (build(queue_size=2 * BATCH, queue_from_epoch=0.0) for _ in range(2))
    for step in range(3):
        method(views_of(*SIDES, seed=step))
    restored.load_state_dict(copy.deepcopy(method.state_dict()))
    losses = [each(views_of(*SIDES)).loss.item() for each in (method, restored)]
    assert losses[0] == losses[1]
    forgetful = build(queue_size=2 * BATCH, queue_from_epoch=0.0)
    state = {key: value for key, value in method.state_dict().items() if "queue" not in key}
    forgetful.load_state_dict(state, strict=False)
    assert forgetful(views_of(*SIDES)).loss.item() != pytest.approx(losses[0], rel=1e-3)


def steps_on_this_rank() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, summed gradients and buffers of four steps, of which the last two use the queue."""
    method = build(queue_size=2 * BATCH, queue_from_epoch=0.0)
    losses = []
    for step in range(4):
        output = method([rank_slice(view, rank(), world_size()) for view in views_of(*SIDES, seed=step)])
        output.loss.backward()
        losses.append(output.loss.item())
    gradients = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return losses, gradients, dict(method.named_buffers())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_with_a_queue_equal_one_process(num_ranks: int) -> None:
    losses, gradients, buffers = steps_on_this_rank()
    results = run_on_ranks(num_ranks, steps_on_this_rank)
    for rank_losses, _, rank_buffers in results:
        assert rank_losses == pytest.approx(losses, rel=1e-9)
        for name, value in buffers.items():
            torch.testing.assert_close(rank_buffers[name], value, rtol=1e-9, atol=1e-12)
    for name, value in gradients.items():
        average = torch.stack([rank_gradients[name] for _, rank_gradients, _ in results]).mean(0)
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_prototypes_are_the_last_layer_and_of_unit_length_after_each_step() -> None:
    method = build()
    (weight,) = method.last_layer()
    assert weight is method.prototypes.weight
    ones = torch.ones(10, dtype=torch.float64)
    torch.testing.assert_close(weight.detach().norm(dim=1), ones, rtol=1e-6, atol=0)  # begun in fp32
    with torch.no_grad():
        weight.mul_(torch.arange(1.0, 11.0)[:, None])
    before = F.normalize(weight.detach(), dim=1)
    method.after_step(at_epoch(0))
    torch.testing.assert_close(weight.detach(), before, rtol=1e-12, atol=1e-15)


def test_recipe_needs_two_large_views_and_a_queue_of_whole_batches() -> None:
    with pytest.raises(
        ValueError, match="views: this method takes 2 large ones and any small ones, the recipe makes 1"
    ):
        build().check_batches(num_views=1, global_batch=BATCH)
    with pytest.raises(ValueError, match="queue_size: 20 is no multiple of the global batch of 8; write 16, say"):
        build(queue_size=20).check_batches(num_views=8, global_batch=BATCH)
    build(queue_size=24).check_batches(num_views=2, global_batch=BATCH)


def test_few_samples_for_many_prototypes_are_advised_against() -> None:
    assert "10 for codes of 8 samples" in build().advice(global_batch=8, num_ranks=1)[0]
    assert build(queue_size=16).advice(global_batch=8, num_ranks=1) == ()


def test_defaults_are_the_published_ones() -> None:
    method = SwAV(TinyResNet())
    widths = [tuple(layer.weight.shape) for layer in method.projector if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 128), (128, 2048)]
    assert method.prototypes.weight.shape == (3000, 128)
    assert (method.temperature, method.epsilon, method.sinkhorn_iterations) == (0.1, 0.05, 3)
    assert len(method.queues) == 0
