from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssl_methods.collectives import rank, world_size
from ssl_methods.losses.dino import DinoLoss, dino_loss, updated_centre
from tests.distributed import run_on_ranks
from tests.ssl_methods.gradients import OUTPUT_DIM, assert_ranks_equal_one_process
from tests.ssl_methods.inputs import rank_slice

CENTRE = torch.linspace(-0.3, 0.5, OUTPUT_DIM, dtype=torch.float64)


def logits(crops: int, *, batch: int = 3, classes: int = OUTPUT_DIM, seed: int = 0) -> Tensor:
    return torch.randn(crops, batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms_of(student: Tensor, teacher: Tensor, *, centre: Tensor = CENTRE, sharp: float = 0.5) -> DinoLoss:
    return dino_loss(student, teacher, centre=centre, student_temperature=0.7, teacher_temperature=sharp)


def by_definition(student: Tensor, teacher: Tensor, centre: Tensor, sharp: float) -> float:
    """Algorithm 1 of the paper with any number of crops, one number at a time."""

    def distribution(values: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in values)
        return [math.exp(x) / total for x in values]

    costs = []
    for t, s in ((t, s) for t in range(len(teacher)) for s in range(len(student)) if s != t):
        for sample in range(student.shape[1]):
            shifted = [(float(x) - float(c)) / sharp for x, c in zip(teacher[t, sample], centre, strict=True)]
            target = distribution(shifted)
            guess = distribution([float(x) / 0.7 for x in student[s, sample]])
            costs.append(-sum(p * math.log(q) for p, q in zip(target, guess, strict=True)))
    return sum(costs) / len(costs)


@pytest.mark.parametrize(("large", "crops"), [(2, 2), (2, 5), (1, 3), (3, 3)])
def test_equals_the_definition(large: int, crops: int) -> None:
    student, teacher = logits(crops), logits(large, seed=1)
    expected = by_definition(student, teacher, CENTRE, 0.5)
    assert float(terms_of(student, teacher).loss) == pytest.approx(expected, rel=1e-12)  # float64, other order of sums


def test_equals_the_value_worked_out_by_hand() -> None:
    student = 0.7 * torch.tensor([0.7, 0.3], dtype=torch.float64).log().expand(2, 1, 2)
    teacher = torch.tensor([[[1000.0, -1000.0]]], dtype=torch.float64)
    loss = terms_of(student, teacher, centre=torch.zeros(2, dtype=torch.float64)).loss
    assert float(loss) == pytest.approx(0.356674944, rel=1e-8)  # -ln 0.7, given to nine digits


def test_uniform_student_costs_the_logarithm_of_the_number_of_classes() -> None:
    student, teacher = torch.zeros(10, 4, 1000), torch.zeros(2, 4, 1000)
    loss = terms_of(student, teacher, centre=torch.zeros(1000)).loss
    assert float(loss) == pytest.approx(math.log(1000), rel=1e-6)  # fp32


def test_a_crop_is_never_compared_with_itself() -> None:
    student, teacher = logits(2).requires_grad_(), logits(1, seed=1)
    terms_of(student, teacher).loss.backward()
    assert student.grad is not None
    assert bool((student.grad[0] == 0).all())
    assert bool((student.grad[1] != 0).all())


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(3).requires_grad_(), logits(2, seed=1).requires_grad_()
    terms_of(student, teacher).loss.backward()
    assert teacher.grad is None


def test_shifting_teacher_and_centre_alike_changes_nothing() -> None:
    student, teacher = logits(3), logits(2, seed=1)
    shift = torch.linspace(5, -5, OUTPUT_DIM, dtype=torch.float64)
    moved = terms_of(student, teacher + shift, centre=CENTRE + shift).loss
    assert float(moved) == pytest.approx(float(terms_of(student, teacher).loss), rel=1e-12)


def test_no_student_beats_the_teachers_own_entropy() -> None:
    teacher = logits(2, seed=1)
    one = teacher[:1].expand(2, -1, -1)  # both large crops say the same
    perfect = terms_of(0.7 * (one - CENTRE) / 0.5, one)
    assert float(perfect.loss) == pytest.approx(float(perfect.entropy), rel=1e-12)
    assert float(terms_of(logits(2), one).loss) > float(perfect.loss)


def test_entropy_and_imbalance_tell_the_two_kinds_of_collapse() -> None:
    nothing = torch.zeros(OUTPUT_DIM, dtype=torch.float64)
    classes = torch.arange(2 * OUTPUT_DIM).view(2, OUTPUT_DIM) % OUTPUT_DIM
    balanced = 100 * torch.nn.functional.one_hot(classes, OUTPUT_DIM).double()  # each class once for each large crop
    one_class = balanced[:, :1].expand(-1, OUTPUT_DIM, -1)[:1].expand(2, -1, -1)
    uniform = torch.zeros_like(balanced)
    cases = {"healthy": balanced, "one class": one_class, "says nothing": uniform}
    found = {name: terms_of(logits(2, batch=OUTPUT_DIM), each, centre=nothing) for name, each in cases.items()}
    full = math.log(OUTPUT_DIM)
    expected = {"healthy": (0.0, 0.0), "one class": (0.0, full), "says nothing": (full, 0.0)}
    for name, terms in found.items():
        assert (float(terms.entropy), float(terms.imbalance)) == pytest.approx(expected[name], abs=1e-12), name


def test_gradient_equals_finite_differences() -> None:
    teacher = logits(2, batch=2, seed=1)
    student = logits(3, batch=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: terms_of(x, teacher).loss, (student,))


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    student, teacher, centre = logits(3).bfloat16(), logits(2, seed=1).bfloat16(), CENTRE.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = terms_of(student, teacher, centre=centre)
        moved = updated_centre(centre, teacher, momentum=0.9)
    assert {each.dtype for each in (*terms, moved)} == {torch.float32}
    assert torch.equal(terms.loss, terms_of(student.float(), teacher.float(), centre=centre).loss)
    assert torch.equal(moved, updated_centre(centre, teacher.float(), momentum=0.9))


def loss_of_two_maps(z1: Tensor, z2: Tensor) -> Tensor:
    """Two large crops and a small one of the student, all dependent on one map, and a teacher that is not trained."""
    return terms_of(torch.stack([z1, z2, z1 * z2]), torch.stack([z2.sin(), z1.cos()])).loss


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(num_ranks: int) -> None:
    assert_ranks_equal_one_process(loss_of_two_maps, num_ranks=num_ranks)


def test_centre_moves_towards_the_mean_over_crops_and_samples() -> None:
    teacher = logits(2, batch=6, seed=1)
    expected = 0.9 * CENTRE + 0.1 * teacher.view(12, -1).mean(dim=0)
    moved = updated_centre(CENTRE, teacher.requires_grad_(), momentum=0.9)
    torch.testing.assert_close(moved, expected, rtol=1e-13, atol=1e-15)
    assert not moved.requires_grad


def centre_on_this_rank() -> Tensor:
    teacher = logits(2, batch=7, seed=1)  # no two rank counts split 7 samples evenly
    mine = rank_slice(teacher.transpose(0, 1), rank(), world_size()).transpose(0, 1)
    return updated_centre(CENTRE, mine, momentum=0.9)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_centre_is_the_same_on_all_ranks_and_that_of_one_process(num_ranks: int) -> None:
    expected = centre_on_this_rank()
    results = run_on_ranks(num_ranks, centre_on_this_rank)
    assert all(torch.equal(each, results[0]) for each in results)
    torch.testing.assert_close(results[0], expected, rtol=1e-13, atol=1e-15)  # float64, other order of sums
