from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.losses.truncated_triplet import (
    TruncatedTripletLoss,
    deputy_similarities,
    median_rank,
    safe_rank,
    true_negative_probability,
    truncated_triplet_loss,
)
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import value_and_gradient
from tests.ssl_methods.inputs import random_views

CONSTANT = 100.0
WIDEST = 6.0  # of what the hinge adds to or takes from its margin, at gamma 2


def one_by_one(anchors: Tensor, targets: Tensor, deputy: str) -> float:
    """The definition, an anchor at a time, from sorted distances of unit vectors."""
    total = 0.0
    for i, anchor in enumerate(F.normalize(anchors, dim=1)):
        distances = (anchor - F.normalize(targets, dim=1)).square().sum(dim=1) - 2
        negatives = torch.cat([distances[:i], distances[i + 1 :]])
        hardest_first = negatives.sort().values
        chosen = {
            "mean_ranks": hardest_first[1:10].mean(),
            "rank": hardest_first[4],
            "median": negatives.median(),
        }[deputy]
        total += max(0.0, float(2 * distances[i] - chosen + CONSTANT))
    return total / len(anchors)


def ranks_of(deputy: str, batch: int) -> tuple[int, int]:
    return {"mean_ranks": (2, 10), "rank": (5, 5), "median": (median_rank(batch - 1),) * 2}[deputy]


def loss_of(anchors: Tensor, targets: Tensor, **knobs: float) -> TruncatedTripletLoss:
    return truncated_triplet_loss(anchors, targets, **{"first_rank": 1, "last_rank": 3, **knobs})  # type: ignore[arg-type]


@pytest.mark.parametrize("deputy", ["mean_ranks", "rank", "median"])
@pytest.mark.parametrize("batch", [11, 12, 196, 197])
def test_t1_vectorised_loss_equals_a_loop_over_anchors(batch: int, deputy: str) -> None:
    anchors, targets = random_views(batch, 16, seed=batch)
    first, last = ranks_of(deputy, batch)
    loss = truncated_triplet_loss(anchors, targets, first_rank=first, last_rank=last).loss
    assert float(loss) == pytest.approx(one_by_one(anchors, targets, deputy), rel=1e-12)  # float64, other order


@pytest.mark.parametrize(
    ("first", "last", "expected"), [(2, 10, 97.0), (median_rank(10), median_rank(10), 97.2), (5, 5, 97.2), (1, 1, 98.0)]
)
def test_equals_the_value_worked_out_by_hand(first: int, last: int, expected: float) -> None:
    cosines = torch.tensor([0.95, *[0.1 * step for step in range(9, -1, -1)]], dtype=torch.float64)
    targets = torch.stack([cosines, (1 - cosines.square()).sqrt(), torch.zeros_like(cosines)], dim=1)
    anchors = torch.eye(3, dtype=torch.float64)[[0] + [2] * 10]  # all but the first are orthogonal to every target
    loss = truncated_triplet_loss(anchors, targets, first_rank=first, last_rank=last).loss
    assert 11 * float(loss) - 10 * CONSTANT == pytest.approx(expected, rel=1e-10)


def test_t2_open_hinge_is_linear_in_the_similarities() -> None:
    terms = truncated_triplet_loss(*random_views(32, 8))
    closed = CONSTANT + 2 * terms.deputy_similarity - 4 * terms.positive_similarity
    assert float(terms.loss) == pytest.approx(float(closed), rel=1e-12)
    assert float(terms.active) == 1


def test_t3_range_and_values_at_the_ends() -> None:
    axes = torch.eye(12, dtype=torch.float64)
    assert float(truncated_triplet_loss(axes, axes).loss) == pytest.approx(96, rel=1e-12)
    collapsed = axes[:1].expand(12, -1)
    assert float(truncated_triplet_loss(collapsed, collapsed).loss) == pytest.approx(98, rel=1e-12)
    opposite = torch.cat([axes[:1], -axes[:1].expand(11, -1)])
    extreme = loss_of(axes[[0] + [1] * 11], opposite)  # of the first anchor: positive 1, all negatives -1
    assert 12 * float(extreme.loss) - 11 * CONSTANT == pytest.approx(CONSTANT - WIDEST, rel=1e-10)
    for seed in range(5):
        assert abs(float(truncated_triplet_loss(*random_views(16, 4, seed=seed)).loss) - CONSTANT) <= WIDEST


def test_t4_gradient_pulls_twice_as_hard_as_the_selected_negatives_push() -> None:
    batch = 16
    anchors = F.normalize(random_views(batch, batch)[0], dim=1).requires_grad_()
    targets = torch.eye(batch, dtype=torch.float64, requires_grad=True)  # so that similarities are the anchors
    truncated_triplet_loss(anchors, targets).loss.backward()
    expected = torch.zeros(batch, batch, dtype=torch.float64)
    for i, row in enumerate(anchors.detach()):
        by_hardness = [j for j in row.argsort(descending=True).tolist() if j != i]
        expected[i, by_hardness[1:10]] = 2 / (9 * batch)
        expected[i, i] = -4 / batch
    # the normalisation takes away what would change an anchor's length
    along = (expected * anchors.detach()).sum(dim=1, keepdim=True) * anchors.detach()
    torch.testing.assert_close(anchors.grad, expected - along, rtol=1e-10, atol=1e-14)
    assert targets.grad is None


def test_t5_deputy_leaves_out_the_image_itself_and_the_hardest_negative() -> None:
    similarities = random_views(12, 12)[0].requires_grad_()
    deputy_similarities(similarities, first_rank=2, last_rank=10).sum().backward()
    assert similarities.grad is not None
    selected = similarities.grad != 0
    hardest = similarities.detach().clone().fill_diagonal_(-torch.inf).argmax(dim=1)
    assert selected.sum(dim=1).tolist() == [9] * 12
    assert not selected.diagonal().any()
    assert not selected[torch.arange(12), hardest].any()


def test_t5_order_of_the_batch_and_lengths_do_not_matter() -> None:
    anchors, targets = random_views(14, 6)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3))
    loss = float(truncated_triplet_loss(anchors, targets).loss)
    assert float(truncated_triplet_loss(anchors[order], targets[order]).loss) == pytest.approx(loss, rel=1e-12)
    assert float(truncated_triplet_loss(3 * anchors, 0.1 * targets).loss) == pytest.approx(loss, rel=1e-12)
    assert float(truncated_triplet_loss(anchors, targets[order]).loss) != pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("batch", "index"), [(196, 97), (197, 97), (11, 4), (12, 5), (2, 0), (3, 0)])
def test_t5_median_is_the_lower_one(batch: int, index: int) -> None:
    assert median_rank(batch - 1) == index + 1 == (batch - 2) // 2 + 1


def gradient_of(margin: float, gamma: float = 2.0) -> tuple[Tensor, float]:
    anchors, targets = random_views(16, 3)
    anchors.requires_grad_()
    terms = loss_of(anchors, targets, margin=margin, gamma=gamma)
    terms.loss.backward()
    assert anchors.grad is not None
    return anchors.grad, float(terms.active)


def test_t6_margin_is_a_constant_while_the_hinge_is_open() -> None:
    torch.testing.assert_close(gradient_of(6.001)[0], gradient_of(100.0)[0], rtol=1e-10, atol=0)


def test_margin_and_gamma_can_close_the_hinge() -> None:
    open_hinge, _ = gradient_of(100.0)
    for margin, gamma in ((0.5, 2.0), (2.0, 4.0)):
        gradient, active = gradient_of(margin, gamma)
        assert 0 < active < 1
        assert int((gradient.norm(dim=1) == 0).sum()) == round(16 * (1 - active))
        assert not torch.allclose(gradient, open_hinge)
    anchors, _ = random_views(16, 3)
    assert float(loss_of(anchors, anchors, margin=0.0, gamma=4.0).loss) == 0


def local_loss(z1: Tensor, z2: Tensor) -> Tensor:
    return loss_of(z1, z2).loss


def mean_of_parts(z1: Tensor, z2: Tensor, *, num_parts: int) -> Tensor:
    parts = zip(z1.chunk(num_parts), z2.chunk(num_parts), strict=True)
    return torch.stack([local_loss(*part) for part in parts]).mean()


def test_t7_ranks_average_the_losses_of_their_own_negatives() -> None:
    value, gradient = value_and_gradient(partial(mean_of_parts, num_parts=2))
    results = run_on_ranks(2, value_and_gradient, local_loss)
    for rank_value, _ in results:
        torch.testing.assert_close(rank_value, value, rtol=1e-12, atol=0)
    average = torch.stack([rank_gradient for _, rank_gradient in results]).mean(0)
    torch.testing.assert_close(average, gradient, rtol=1e-9, atol=1e-12)
    gathered, _ = value_and_gradient(local_loss)
    assert float(gathered) > float(value) + 1e-3  # more negatives, so harder ones
    assert float(value_and_gradient(partial(mean_of_parts, num_parts=1))[0]) == float(gathered)


def test_too_few_negatives_are_refused() -> None:
    with pytest.raises(ValueError, match="last_rank: 10, but a batch of 10 on a rank has 9 negatives an image"):
        truncated_triplet_loss(*random_views(10, 4))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    anchors, targets = (z.bfloat16() for z in random_views(16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = truncated_triplet_loss(anchors, targets).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, truncated_triplet_loss(anchors.float(), targets.float()).loss)


def test_gradient_equals_finite_differences() -> None:
    anchors, targets = random_views(5, 4)
    anchors.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(z, targets, margin=3.0).loss, (anchors,))


@pytest.mark.parametrize(
    ("num_negatives", "num_classes", "expected"),
    [
        (195, 1000, {1: 0.823, 2: 0.983, 5: 1.0}),
        (4095, 1000, {1: 0.017, 2: 0.085, 5: 0.610, 10: 0.991}),
        (255, 100, {1: 0.077, 2: 0.276, 5: 0.885, 10: 1.0}),
        (255, 10, {1: 0.0, 2: 0.0, 5: 0.0, 10: 0.0001, 20: 0.10}),
    ],
)
def test_probability_of_a_true_deputy(num_negatives: int, num_classes: int, expected: dict[int, float]) -> None:
    counts = {"num_negatives": num_negatives, "num_classes": num_classes}
    for rank, probability in expected.items():
        digits = 4 if probability == 0.0001 else 2 if probability == 0.10 else 3
        assert round(true_negative_probability(rank, **counts), digits) == probability
    safe = safe_rank(0.9, **counts)
    assert true_negative_probability(safe, **counts) >= 0.9 > true_negative_probability(safe - 1, **counts)


def test_probability_equals_the_binomial_sum() -> None:
    exact = sum(math.comb(19, i) * 0.25**i * 0.75 ** (19 - i) for i in range(6))
    found = true_negative_probability(6, num_negatives=19, num_classes=4)
    assert found == pytest.approx(exact, rel=1e-12)
    assert safe_rank(0.999, num_negatives=3, num_classes=2) == 3
