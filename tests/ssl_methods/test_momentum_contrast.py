from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import rank, shared_permutation, world_size
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.momentum_contrast import MomentumContrast
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

DIM, BATCH, SIZE = 8, 4, 12


class Linear(Backbone):
    """The pixels through a linear map: no image touches another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 6
        self.weight = nn.Parameter(torch.randn(12, 6))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def build(*, momentum: float = 0.9) -> tuple[MomentumContrast, nn.ModuleList]:
    """Return momentum contrast and the encoder that it follows, whose weights are another's than the twin's."""
    torch.manual_seed(0)
    encoder = nn.ModuleList([Linear(), nn.Linear(6, DIM)])
    contrast = MomentumContrast(
        Linear(), nn.Linear(6, DIM), embed_dim=DIM, queue_size=SIZE, momentum=momentum, temperature=0.2
    )
    return contrast.double(), encoder.double()


def view_of(step: int) -> Tensor:
    """This rank's part of a view of 4 images."""
    generator = torch.Generator().manual_seed(step)
    return rank_slice(torch.randn(BATCH, 3, 2, 2, generator=generator, dtype=torch.float64), rank(), world_size())


def step_of(contrast: MomentumContrast, encoder: nn.ModuleList, step: int) -> Tensor:
    loss: Tensor = contrast(encoder[1](encoder[0](view_of(100 + step))), view_of(step)).loss
    return loss


def test_loss_is_against_the_queue_of_the_steps_before() -> None:
    contrast, encoder = build()
    queue = contrast.queue.negatives()
    queries = encoder[1](encoder[0](view_of(100)))
    keys = contrast.projector(contrast.backbone(view_of(0)))
    terms = info_nce_loss(queries, keys, queue, temperature=0.2)
    output = contrast(queries, view_of(0))
    assert torch.equal(output.loss, terms.loss)
    assert torch.equal(output.metrics["info_nce"], terms.loss.detach())
    similarity = F.cosine_similarity(queries, keys).mean().detach()
    assert float(output.metrics["positive_similarity"]) == pytest.approx(float(similarity), rel=1e-6)  # fp32
    assert set(output.metrics) == {"info_nce", "contrast_accuracy", "positive_similarity", "embedding_std"}


def test_d4_random_directions_cost_a_uniform_guess_at_high_temperature() -> None:
    torch.manual_seed(0)
    queries, keys, queue = (F.normalize(torch.randn(size, 16), dim=1) for size in (8, 8, 65536))
    loss = float(info_nce_loss(queries, keys, queue, temperature=1000.0).loss)
    assert loss == pytest.approx(math.log(65537), rel=1e-4)
    assert loss == pytest.approx(11.0904, abs=1e-3)


def test_d5_queue_turns_over_in_order_and_keeps_unit_keys() -> None:
    contrast, encoder = build()
    start = contrast.queue.negatives()
    for step in range(SIZE // BATCH + 1):
        step_of(contrast, encoder, step)
        assert int(contrast.queue.position) == (step + 1) * BATCH % SIZE
    keys = contrast.queue.keys
    assert bool((keys != start).any(dim=1).all())  # every initial key is gone
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(SIZE, dtype=torch.float64), rtol=1e-12, atol=0)
    for slot, step in ((0, 3), (1, 1), (2, 2)):  # the fourth batch took the first one's place
        expected = F.normalize(contrast.projector(contrast.backbone(view_of(step))), dim=1).detach()
        torch.testing.assert_close(keys[slot * BATCH : (slot + 1) * BATCH], expected, rtol=1e-12, atol=1e-15)


def on_this_rank() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queue and mean loss after two steps, gradient of the queries' weight, and a permutation of 64 things."""
    contrast, encoder = build()
    torch.manual_seed(50 + rank())
    losses = torch.stack([step_of(contrast, encoder, step) for step in range(2)])
    losses.sum().backward()
    gradient = encoder[0].get_parameter("weight").grad
    assert gradient is not None
    return contrast.queue.keys, losses.detach(), gradient, shared_permutation(64, device=torch.device("cpu"))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_d6_shuffling_changes_nothing_without_batch_norm_and_ranks_agree(num_ranks: int) -> None:
    keys, losses, gradient, _ = on_this_rank()
    results = run_on_ranks(num_ranks, on_this_rank)
    for rank_keys, rank_losses, _, order in results:
        torch.testing.assert_close(rank_keys, keys, rtol=1e-10, atol=1e-14)  # float64, sums in another order
        torch.testing.assert_close(rank_losses, losses, rtol=1e-10, atol=0)
        assert torch.equal(rank_keys, results[0][0])
        assert torch.equal(order, results[0][3])
        assert not torch.equal(order, torch.arange(64)) and torch.equal(order.sort().values, torch.arange(64))
    average = torch.stack([rank_gradient for _, _, rank_gradient, _ in results]).mean(0)
    torch.testing.assert_close(average, gradient, rtol=1e-9, atol=1e-13)


def test_d8_twin_without_memory_is_the_encoder_of_before_the_update() -> None:
    contrast, encoder = build(momentum=0.0)
    contrast.follow(tuple(encoder))  # after a step, so from the weights that the next step's queries use
    queries = encoder[1](encoder[0](view_of(0)))
    output = contrast(queries, view_of(0))
    assert float(output.metrics["positive_similarity"]) == pytest.approx(1, rel=1e-6)  # fp32
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(1)  # this step's update comes too late for its keys
    expected = F.normalize(queries.detach(), dim=1)
    torch.testing.assert_close(contrast.queue.keys[:BATCH], expected, rtol=1e-10, atol=1e-14)


def test_twin_keeps_its_share_and_gets_no_gradient() -> None:
    contrast, encoder = build(momentum=0.9)
    before = [value.clone() for value in contrast.parameters()]
    view = view_of(0).requires_grad_()
    contrast(encoder[1](encoder[0](view_of(100))), view).loss.backward()
    assert view.grad is None
    assert all(value.grad is None and not value.requires_grad for value in contrast.parameters())
    assert all(value.grad is not None for value in encoder.parameters())
    contrast.follow(tuple(encoder))
    for old, twin, online in zip(before, contrast.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(twin, 0.9 * old + 0.1 * online, rtol=1e-12, atol=1e-15)


def test_follow_wants_both_parts_of_the_encoder() -> None:
    contrast, encoder = build()
    with pytest.raises(ValueError, match="shorter"):
        contrast.follow((encoder[0],))
