"""Our losses beside those of lightly 1.6.0, an independent library, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightly.loss as peer
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.losses.barlow_twins import barlow_twins_loss
from ssl_methods.losses.dino import dino_loss, updated_centre
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.losses.negative_cosine import negative_cosine_loss
from ssl_methods.losses.nt_xent import nt_xent_loss
from ssl_methods.losses.swav import sinkhorn, swav_loss
from ssl_methods.losses.vicreg import vicreg_loss
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import value_and_gradient
from tests.ssl_methods.inputs import closed_views, random_views

Loss = Callable[[Tensor, Tensor], Tensor]
DIM = 16


def seeded_views() -> tuple[Tensor, Tensor]:
    """Two unrelated views of 8 samples, from torch's generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, DIM, generator=generator), torch.randn(8, DIM, generator=generator)


def directions(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def our_moco(z1: Tensor, z2: Tensor) -> Tensor:
    return info_nce_loss(z1, z2.detach(), directions(32, 2).to(z1.dtype), temperature=0.1).loss


def their_moco(z1: Tensor, z2: Tensor) -> Tensor:
    loss = peer.NTXentLoss(0.1, memory_bank_size=(32, DIM))
    loss.memory_bank.bank = directions(32, 2).to(z1.dtype)
    value: Tensor = loss(z1, z2.detach())
    return value


def dino_after(num_calls: int) -> tuple[Loss, Loss]:
    """Our loss and theirs at a call, when the centre has moved before."""

    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        teacher = torch.stack([z1, z2]).detach()
        centre = torch.zeros(DIM, dtype=z1.dtype)
        for _ in range(num_calls - 1):
            centre = updated_centre(centre, teacher, momentum=0.9)
        student = 0.9 * torch.stack([z1, z2])
        fp32 = float(torch.tensor(0.04))  # theirs rounds the teacher's temperature to it
        return dino_loss(student, teacher, centre=centre, student_temperature=0.1, teacher_temperature=fp32).loss

    def theirs(z1: Tensor, z2: Tensor) -> Tensor:
        loss = peer.DINOLoss(output_dim=DIM, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9).to(z1.dtype)
        values = [loss([z1.detach(), z2.detach()], [0.9 * z1, 0.9 * z2]) for _ in range(num_calls)]
        last: Tensor = values[-1]
        return last

    return ours, theirs


def scores_of(*views: Tensor) -> list[Tensor]:
    prototypes = directions(12, 1).to(views[0].dtype)
    return [F.normalize(view, dim=1) @ prototypes.T for view in views]


def our_swav(*views: Tensor, num_large: int = 2) -> Tensor:
    scores = torch.stack(scores_of(*views))
    return swav_loss(scores, sinkhorn(scores[:num_large], epsilon=0.05, iterations=3), temperature=0.1)


def their_swav(*views: Tensor, num_large: int = 2) -> Tensor:
    scores = scores_of(*views)
    value: Tensor = peer.SwaVLoss(temperature=0.1)(scores[:num_large], scores[num_large:])
    return value.squeeze()


# ours, theirs, and the value on seeded and on closed views
CASES: dict[str, tuple[Loss, Loss, float, float]] = {
    "barlow_twins": (
        lambda z1, z2: barlow_twins_loss(z1, z2, off_diagonal=5e-3).loss,
        lambda z1, z2: peer.BarlowTwinsLoss(lambda_param=5e-3)(z1, z2),
        16.0077877,
        0.7791002,
    ),
    "nt_xent": (
        lambda z1, z2: nt_xent_loss(z1, z2, temperature=0.5),
        lambda z1, z2: peer.NTXentLoss(temperature=0.5)(z1, z2),
        2.5931916,
        1.9714299,
    ),
    "moco": (our_moco, their_moco, 4.6306715, 0.0274926),
    "negative_cosine": (
        negative_cosine_loss,
        lambda z1, z2: peer.NegativeCosineSimilarity()(z1, z2.detach()),
        -0.1018992,
        -0.9772449,
    ),
    "vicreg": (
        lambda z1, z2: vicreg_loss(z1, z2).loss,
        lambda z1, z2: peer.VICRegLoss()(z1, z2),
        46.3908730,
        14.2268143,
    ),
    "dino": (*dino_after(1), 13.9685249, 1.3120809),
    "dino_second_call": (*dino_after(2), 14.2043247, 1.3395282),
    "swav": (our_swav, their_swav, 5.0772185, 3.0902476),
}
each_loss = pytest.mark.parametrize("name", CASES)


@each_loss
def test_both_give_the_recorded_values(name: str) -> None:
    ours, theirs, *recorded = CASES[name]
    for views, value in zip((seeded_views(), closed_views()), recorded, strict=True):
        # fp32, recorded with seven digits after the point or fewer
        assert float(ours(*views)) == pytest.approx(value, rel=2e-6, abs=1e-7)
        assert float(theirs(*views)) == pytest.approx(value, rel=2e-6, abs=1e-7)


@each_loss
@pytest.mark.parametrize("num_samples", [5, 40])
def test_value_and_gradient_are_equal_on_random_views(name: str, num_samples: int) -> None:
    found = []
    for loss in CASES[name][:2]:
        views = [view.requires_grad_() for view in random_views(num_samples, DIM, seed=num_samples)]
        value = loss(views[0], views[1])
        gradients = torch.autograd.grad(value, views, allow_unused=True)
        found.append((value.detach(), *gradients))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)  # float64, other order of sums


def test_wide_vicreg_is_equal_too() -> None:
    found = []
    for loss in CASES["vicreg"][:2]:
        views = [view.requires_grad_() for view in random_views(6, 50)]
        value = loss(views[0], views[1])
        found.append((value.detach(), *torch.autograd.grad(value, views)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_swav_is_equal_with_small_crops_and_a_queue() -> None:
    views = [*random_views(6, DIM), *random_views(6, DIM, seed=1)]
    torch.testing.assert_close(our_swav(*views), their_swav(*views), rtol=1e-10, atol=0)
    scores, queued = torch.stack(scores_of(*views)), torch.stack(scores_of(*random_views(9, DIM, seed=2)))
    codes = sinkhorn(torch.cat([scores[:2], queued], dim=1), epsilon=0.05, iterations=3)[:, :6]
    expected = peer.SwaVLoss(temperature=0.1)(list(scores[:2]), list(scores[2:]), list(queued))
    torch.testing.assert_close(swav_loss(scores, codes, temperature=0.1), expected.squeeze(), rtol=1e-10, atol=0)


def our_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    return barlow_twins_loss(z1, z2, off_diagonal=5e-3).loss


def their_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    value: Tensor = peer.BarlowTwinsLoss(lambda_param=5e-3, gather_distributed=True)(z1, z2)
    return value


def both_on_this_rank() -> list[Any]:
    return [value_and_gradient(loss) for loss in (our_barlow_twins, their_barlow_twins)]


def test_two_ranks_equal_one_process_in_our_barlow_twins_and_not_in_theirs() -> None:
    (value, gradient), (their_value, _) = both_on_this_rank()
    torch.testing.assert_close(their_value, value, rtol=1e-12, atol=0)
    ours, theirs = zip(*run_on_ranks(2, both_on_this_rank), strict=True)
    for each, _ in ours:
        torch.testing.assert_close(each, value, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.stack([each for _, each in ours]).mean(0), gradient, rtol=1e-9, atol=1e-12)
    # theirs standardises with the moments of one rank's samples
    assert float(theirs[0][0]) != pytest.approx(float(value), rel=0.01)
    mean = torch.stack([each for _, each in theirs]).mean(0)
    assert float((mean - gradient).norm() / gradient.norm()) > 0.05
