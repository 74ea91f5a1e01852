from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.backbones.tiny_vit import TinyViT
from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.method import Progress
from ssl_methods.methods.moco import MoCo
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

NUM_SAMPLES = 8
STEP = Progress(step=1, total_steps=10, steps_per_epoch=5.0)


def build(backbone: type[Backbone] = TinyResNet, **knobs: Any) -> MoCo:
    torch.manual_seed(0)
    return MoCo(backbone(), embed_dim=16, hidden_dim=24, queue_size=32, **knobs).double()


def views_of(step: int = 0) -> list[Tensor]:
    """This rank's part of two views of 8 images."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(2, NUM_SAMPLES, 3, 12, 12, generator=generator, dtype=torch.float64)
    return [rank_slice(view, rank(), world_size()) for view in views]


def take_step(method: MoCo, step: int = 0) -> Tensor:
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    output = method(views_of(step))
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    return output.loss.detach()


def test_a_step_sees_the_queue_as_it_was_and_then_fills_it() -> None:
    method, untouched = build(), build()
    queries, keys = (untouched.projector(untouched.backbone(view)) for view in views_of())
    expected = info_nce_loss(queries, keys, untouched.contrast.queue.negatives(), temperature=0.2).loss
    assert float(method(views_of()).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    stored = method.contrast.queue.keys
    torch.testing.assert_close(stored[:NUM_SAMPLES], F.normalize(keys.detach(), dim=1), rtol=1e-10, atol=1e-12)
    assert torch.equal(stored[NUM_SAMPLES:], untouched.contrast.queue.keys[NUM_SAMPLES:])
    assert int(method.contrast.queue.position) == NUM_SAMPLES


def test_twin_is_averaged_after_the_step_and_its_moments_follow_from_its_own_passes() -> None:
    method = build(momentum=0.9)
    before = {name: value.clone() for name, value in method.contrast.backbone.named_parameters()}
    take_step(method)
    assert all(torch.equal(value, before[name]) for name, value in method.contrast.backbone.named_parameters())
    moments = {name: value.clone() for name, value in method.contrast.backbone.named_buffers()}
    method.after_step(STEP)
    online = dict(method.backbone.named_parameters())
    for name, value in method.contrast.backbone.named_parameters():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name], rtol=1e-12, atol=1e-15)
    for name, value in method.contrast.backbone.named_buffers():
        assert torch.equal(value, moments[name])
    assert int(method.contrast.backbone.get_buffer("stem.1.num_batches_tracked")) == 1
    mine, twins = (each.get_buffer("stem.1.running_mean") for each in (method.backbone, method.contrast.backbone))
    assert not torch.equal(mine, twins)  # each has seen its own view


def test_updating_the_twin_after_the_step_equals_the_papers_order() -> None:
    ours, papers = build(momentum=0.7), build(momentum=0.7)
    for step in range(4):
        papers.after_step(STEP)  # before the keys are encoded, from the weights before this step's update
        expected = take_step(papers, step)
        assert torch.equal(take_step(ours, step), expected)
        ours.after_step(STEP)


def test_queue_that_the_global_batch_does_not_divide_is_refused_before_training() -> None:
    method = build()
    method.check_batches(num_views=2, global_batch=16)
    with pytest.raises(ValueError, match="queue_size: 32 is no multiple of the global batch of 12; write 24, say"):
        method.check_batches(num_views=2, global_batch=12)


def test_another_number_of_views_is_refused() -> None:
    with pytest.raises(ValueError, match="views: this method takes 2, the recipe makes 1"):
        build()(views_of()[:1])


def step_on_this_rank(backbone: type[Backbone]) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss, gradients and queue after one step; rank r's generator starts from seed 50 + r."""
    method = build(backbone)
    torch.manual_seed(50 + rank())
    output = method(views_of())
    output.loss.backward()
    gradients = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients, method.contrast.queue.keys, method.contrast.queue.position


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_batch_norm_is_all_that_ties_it_to_the_rank_count(num_ranks: int) -> None:
    loss, gradients, keys, position = step_on_this_rank(TinyViT)
    results = run_on_ranks(num_ranks, step_on_this_rank, TinyViT)
    for rank_loss, _, rank_keys, rank_position in results:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=0)  # float64, sums in another order
        torch.testing.assert_close(rank_keys, keys, rtol=1e-9, atol=1e-12)
        assert torch.equal(rank_keys, results[0][2])
        assert torch.equal(rank_position, position)
    for name, value in gradients.items():
        average = torch.stack([rank_gradients[name] for _, rank_gradients, _, _ in results]).mean(0)
        torch.testing.assert_close(average, value, rtol=1e-7, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_keys_are_made_of_shuffled_parts_and_come_back_in_order() -> None:
    _, _, keys, _ = run_on_ranks(2, step_on_this_rank, TinyResNet)[1]
    method = build()
    images = views_of()[1]  # of one process: the global batch
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(50))  # rank 0's generator
    expected = torch.empty(NUM_SAMPLES, 16, dtype=torch.float64)
    for part in order.chunk(2):
        expected[part] = method.contrast.projector(method.contrast.backbone(images[part]))
    torch.testing.assert_close(keys[:NUM_SAMPLES], F.normalize(expected, dim=1), rtol=1e-9, atol=1e-12)
    unshuffled = torch.cat([method.contrast.projector(method.contrast.backbone(part)) for part in images.chunk(2)])
    assert (keys[:NUM_SAMPLES] - F.normalize(unshuffled, dim=1)).abs().max() > 1e-3


def shuffles_on_this_rank() -> list[Tensor]:
    """Keys of one batch three times: the third time with the random numbers of the first."""
    method = build()
    torch.manual_seed(50 + rank())
    state = torch.get_rng_state()
    found = []
    for restore in (False, False, True):
        if restore:
            torch.set_rng_state(state)
        method.contrast.queue.position.zero_()
        method(views_of())
        found.append(method.contrast.queue.keys[:NUM_SAMPLES].clone())
    return found


def test_restored_generator_brings_the_shuffle_back() -> None:
    for first, second, again in run_on_ranks(2, shuffles_on_this_rank):
        assert torch.equal(first, again)
        assert not torch.equal(first, second)


def test_projector_is_the_published_one() -> None:
    layers = list(build().projector)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [layer.weight.shape for layer in layers if isinstance(layer, nn.Linear)] == [(24, 128), (16, 24)]
    published = MoCo(TinyViT())
    assert published.contrast.queue.keys.shape == (65536, 128)
    assert (published.contrast.momentum, published.contrast.temperature) == (0.999, 0.2)
