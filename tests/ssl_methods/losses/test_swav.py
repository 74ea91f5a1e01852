from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.swav import sinkhorn, swav_loss
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import assert_ranks_equal_one_process
from tests.ssl_methods.inputs import rank_slice


def cosines(num_crops: int, *, batch: int = 6, num_prototypes: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples, prototypes = (
        F.normalize(torch.randn(*shape, 4, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((num_crops, batch), (num_prototypes,))
    )
    return samples @ prototypes.T


def codes_of(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    codes: Tensor = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    return codes


def codes_by_definition(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """The authors' procedure: prototypes, then samples, divided by their sums."""
    codes = [[math.exp(score / epsilon) for score in row] for row in scores]
    for _ in range(iterations):
        sums = [sum(column) for column in zip(*codes, strict=True)]
        codes = [[value / total for value, total in zip(row, sums, strict=True)] for row in codes]
        codes = [[value / sum(row) for value in row] for row in codes]
    return codes


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1), (0.1, 10)])
def test_codes_equal_the_definition_crop_by_crop(epsilon: float, iterations: int) -> None:
    scores = cosines(2)
    expected = [codes_by_definition(crop.tolist(), epsilon, iterations) for crop in scores]
    codes = codes_of(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(codes, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def test_codes_sum_to_one_and_use_all_prototypes_equally() -> None:
    codes = codes_of(cosines(2, batch=40), epsilon=0.5, iterations=100)
    torch.testing.assert_close(codes.sum(dim=2), torch.ones(2, 40, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(codes.sum(dim=1), torch.full((2, 5), 8.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_codes_need_no_more_than_differences_of_scores() -> None:
    scores = cosines(2)
    shifted = codes_of((scores + 1000).float())
    torch.testing.assert_close(shifted, codes_of(scores).float(), rtol=2e-2, atol=1e-4)  # fp32 of 1000, over epsilon
    assert bool(codes_of(1e4 * scores).isfinite().all())


def test_rows_of_minus_infinity_take_no_part() -> None:
    scores = cosines(2)
    nothing = torch.full((2, 3, 5), -torch.inf, dtype=torch.float64)
    codes = codes_of(torch.cat([nothing, scores], dim=1))
    assert bool((codes[:, :3] == 0).all())
    torch.testing.assert_close(codes[:, 3:], codes_of(scores), rtol=1e-12, atol=1e-15)


def test_other_rows_change_a_samples_code() -> None:
    scores = cosines(2)
    assert float((codes_of(scores)[:, :3] - codes_of(scores[:, :3])).abs().max()) > 0.01


def loss_by_definition(scores: Tensor, codes: Tensor, temperature: float) -> float:
    """Equations 2 and 6 of the paper, one pair of crops and one sample at a time."""
    values = []
    for large, code in enumerate(codes.tolist()):
        for crop, logits in enumerate(scores.tolist()):
            if crop == large:
                continue
            for target, row in zip(code, logits, strict=True):
                total = sum(math.exp(score / temperature) for score in row)
                logs = [score / temperature - math.log(total) for score in row]
                values.append(-sum(q * log for q, log in zip(target, logs, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("num_crops", [2, 5])
def test_loss_equals_the_definition(num_crops: int) -> None:
    scores = cosines(num_crops)
    codes = codes_of(scores[:2])
    expected = loss_by_definition(scores, codes, 0.1)
    assert float(swav_loss(scores, codes, temperature=0.1)) == pytest.approx(expected, rel=1e-12)


def test_uniform_predictions_cost_the_logarithm_of_the_number_of_prototypes() -> None:
    scores = cosines(4, num_prototypes=30)
    loss = swav_loss(torch.zeros_like(scores), codes_of(scores[:2]), temperature=0.1)
    assert float(loss) == pytest.approx(math.log(30), rel=1e-12)


def test_a_crop_never_predicts_its_own_code() -> None:
    scores = cosines(2).requires_grad_()
    codes = codes_of(scores.detach()[:1])
    swav_loss(scores, codes, temperature=0.1).backward()
    assert scores.grad is not None
    assert float(scores.grad[0].abs().max()) < 1e-15
    assert bool((scores.grad[1] != 0).all())


def test_codes_get_no_gradient() -> None:
    scores = cosines(3).requires_grad_()
    codes = codes_of(scores[:2])
    assert not codes.requires_grad
    codes.requires_grad_()
    swav_loss(scores, codes, temperature=0.1).backward()
    assert codes.grad is None


def test_gradient_equals_finite_differences() -> None:
    scores = cosines(3, batch=3).requires_grad_()
    codes = codes_of(scores[:2])
    assert torch.autograd.gradcheck(lambda x: swav_loss(x, codes, temperature=0.1), (scores,))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    scores = cosines(3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = codes_of(scores[:2])
        loss = swav_loss(scores, codes, temperature=0.1)
    assert (codes.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert torch.equal(codes, codes_of(scores[:2].float()))
    assert torch.equal(loss, swav_loss(scores.float(), codes, temperature=0.1))


def loss_of_two_maps(z1: Tensor, z2: Tensor) -> Tensor:
    """Two large crops and a small one, whose scores and codes all depend on one map."""
    scores = F.normalize(torch.stack([z1, z2, z1 * z2]), dim=-1)
    return swav_loss(scores, codes_of(scores[:2]), temperature=0.1)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(loss_of_two_maps, num_ranks=num_ranks)


def codes_on_this_rank() -> Tensor:
    scores = cosines(2, batch=7).transpose(0, 1)  # no two rank counts split 7 samples evenly
    return codes_of(rank_slice(scores, rank(), world_size()).transpose(0, 1))


def test_codes_are_those_of_all_ranks_samples() -> None:
    parts = run_on_ranks(2, codes_on_this_rank)
    torch.testing.assert_close(torch.cat(parts, dim=1), codes_on_this_rank(), rtol=1e-12, atol=1e-15)
