from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from ssl_methods.collectives import rank, world_size
from ssl_methods.indicators import entropy
from ssl_methods.losses import region
from ssl_methods.losses.region import RegionLoss, match_regions, region_loss
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

BATCH, CLASSES, DIM = 3, 5, 4
COUNTS = (4, 4, 2, 3)  # regions of each crop; the first two are large
CENTRE = torch.linspace(-0.3, 0.5, CLASSES, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def crops(dim: int, *, seed: int) -> list[Tensor]:
    return [random(BATCH, count, dim, seed=seed + index) for index, count in enumerate(COUNTS)]


def case() -> dict[str, Any]:
    """Logits and features of four crops of the student, and of the two large ones of the teacher."""
    return {
        "student": rows_of(crops(CLASSES, seed=0)),
        "teacher": random(2, BATCH, COUNTS[0], CLASSES, seed=10),
        "student_features": crops(DIM, seed=20),
        "teacher_features": random(2, BATCH, COUNTS[0], DIM, seed=30),
        "centre": CENTRE,
    }


def rows_of(logits: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten(0, 1) for each in logits])


def terms_of(inputs: dict[str, Any]) -> RegionLoss:
    return region_loss(**inputs, student_temperature=0.7, teacher_temperature=0.5)


def by_definition() -> float:
    """The authors' formula, one region at a time."""
    inputs, student = case(), crops(CLASSES, seed=0)
    costs = []
    for t, s in ((t, s) for t in range(2) for s in range(len(COUNTS)) if s != t):
        for image in range(BATCH):
            of_regions = []
            for i in range(COUNTS[s]):
                own = inputs["student_features"][s][image, i]
                found = [float(F.cosine_similarity(own, each, dim=0)) for each in inputs["teacher_features"][t, image]]
                match = max(range(COUNTS[0]), key=lambda j: found[j])
                target = F.softmax((inputs["teacher"][t, image, match] - CENTRE) / 0.5, dim=0)
                of_regions.append(float(-(target * F.log_softmax(student[s][image, i] / 0.7, dim=0)).sum()))
            costs.append(sum(of_regions) / len(of_regions))
    return sum(costs) / len(costs)


def test_equals_the_definition() -> None:
    assert float(terms_of(case()).loss) == pytest.approx(by_definition(), rel=1e-12)  # float64, other order of sums


def test_equals_the_value_worked_out_by_hand() -> None:
    student = torch.tensor([0.7, 0.3], dtype=torch.float64).log().expand(6, 2)  # two crops, one image, three regions
    teacher = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    features = torch.eye(3, dtype=torch.float64)
    matched = features[[1, 0, 1]][None]  # the second, the first, the second region of the teacher
    terms = region_loss(
        student,
        teacher[None, None],
        student_features=[matched, matched],
        teacher_features=features[None, None],
        centre=torch.zeros(2, dtype=torch.float64),
        student_temperature=1.0,
        teacher_temperature=1.0,
    )
    assert float(terms.loss) == pytest.approx(0.836810398, rel=1e-9)
    assert float(terms.distinct) == pytest.approx(2 / 3)


def test_e1_uniform_student_and_teacher_cost_the_logarithm_of_the_number_of_classes() -> None:
    inputs = {**case(), "student": torch.zeros(BATCH * sum(COUNTS), 65536), "centre": torch.zeros(65536)}
    terms = terms_of({**inputs, "teacher": torch.zeros(2, BATCH, COUNTS[0], 65536)})
    assert float(terms.loss) == pytest.approx(11.0904, abs=5e-5)
    assert (float(terms.entropy), float(terms.imbalance)) == pytest.approx((11.0904, 0.0), abs=5e-5)


def test_e3_a_permuted_copy_is_matched_and_costs_the_teachers_own_entropy() -> None:
    order = torch.tensor([2, 0, 3, 1])
    teacher_features, teacher = random(1, BATCH, 4, DIM, seed=1), random(1, BATCH, 4, CLASSES, seed=2)
    copy = teacher_features[0][:, order] * torch.tensor([0.1, 1.0, 3.0, 20.0], dtype=torch.float64)[:, None]
    assert torch.equal(match_regions(copy, teacher_features[0]), order.expand(BATCH, -1))
    logits = (teacher[0][:, order] - CENTRE) / 0.5 * 0.7
    terms = terms_of(
        {
            "student": rows_of([logits, logits]),
            "teacher": teacher,
            "student_features": [copy, copy],
            "teacher_features": teacher_features,
            "centre": CENTRE,
        }
    )
    mean_entropy = entropy(F.softmax((teacher - CENTRE) / 0.5, dim=-1)).mean()
    assert float(terms.loss) == pytest.approx(float(mean_entropy), rel=1e-12)
    assert float(terms.entropy) == pytest.approx(float(mean_entropy), rel=1e-12)
    assert float(terms.distinct) == 1.0


def test_e4_order_of_the_teachers_regions_and_lengths_of_features_do_not_matter() -> None:
    inputs = case()
    expected = float(terms_of(inputs).loss)
    order = torch.tensor([3, 1, 0, 2])
    shuffled = {key: inputs[key][:, :, order] for key in ("teacher", "teacher_features")}
    assert float(terms_of({**inputs, **shuffled}).loss) == pytest.approx(expected, rel=1e-12)
    longer = [7.0 * each for each in inputs["student_features"]]
    assert float(terms_of({**inputs, "student_features": longer}).loss) == pytest.approx(expected, rel=1e-12)
    # the student's regions in another order, features and logits alike
    logits, features = crops(CLASSES, seed=0), list(inputs["student_features"])
    logits[0], features[0] = logits[0][:, order], features[0][:, order]
    moved = {**inputs, "student": rows_of(logits), "student_features": features}
    assert float(terms_of(moved).loss) == pytest.approx(expected, rel=1e-12)


def test_e5_teacher_and_features_get_no_gradient_and_the_student_the_exact_one() -> None:
    inputs = case()
    others = [inputs["teacher"], inputs["teacher_features"], *inputs["student_features"]]
    for each in (inputs["student"], *others):
        each.requires_grad_()
    terms_of(inputs).loss.backward()
    assert inputs["student"].grad is not None
    assert all(each.grad is None for each in others)
    inputs = case()
    assert torch.autograd.gradcheck(
        lambda student: terms_of({**inputs, "student": student}).loss, (inputs["student"].requires_grad_(),)
    )


def test_e6_shifting_teacher_and_centre_alike_changes_nothing() -> None:
    inputs = case()
    shift = torch.linspace(5, -5, CLASSES, dtype=torch.float64)
    moved = {**inputs, "teacher": inputs["teacher"] + shift, "centre": CENTRE + shift}
    assert float(terms_of(moved).loss) == pytest.approx(float(terms_of(inputs).loss), rel=1e-12)


def test_a_crop_is_never_compared_with_itself() -> None:
    inputs = {**case(), "student": case()["student"].requires_grad_()}
    only = {key: inputs[key][:1] for key in ("teacher", "teacher_features")}
    terms_of({**inputs, **only}).loss.backward()
    own, others = inputs["student"].grad.split([BATCH * COUNTS[0], BATCH * sum(COUNTS[1:])])
    assert bool((own == 0).all())
    assert bool((others != 0).all())


def test_parts_of_any_size_give_the_same_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (region._CHUNK, 2 * CLASSES, 7 * CLASSES, 1):
        monkeypatch.setattr(region, "_CHUNK", chunk)
        inputs = case()
        terms = terms_of({**inputs, "student": inputs["student"].requires_grad_()})
        terms.loss.backward()
        found.append((*(each.detach() for each in terms), inputs["student"].grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_one_region_that_all_are_likest_to_shows() -> None:
    inputs = case()
    inputs["teacher_features"] = -inputs["teacher_features"].abs()
    inputs["teacher_features"][:, :, 2] *= -1
    inputs["student_features"] = [each.abs() for each in inputs["student_features"]]
    # one of four, two and three regions: of crops 1, 2, 3 and of 0, 2, 3
    assert float(terms_of(inputs).distinct) == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3)


def test_half_precision_is_widened_before_any_arithmetic() -> None:
    inputs = case()
    half = {key: inputs[key].bfloat16() for key in ("student", "teacher", "teacher_features")}
    half |= {"student_features": [each.bfloat16() for each in inputs["student_features"]], "centre": CENTRE.float()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = terms_of({**half, "student": half["student"].requires_grad_()})
    terms.loss.backward()
    assert half["student"].grad.dtype == torch.bfloat16
    assert {each.dtype for each in terms} == {torch.float32}
    wide = {key: half[key].detach().float() for key in ("student", "teacher", "teacher_features")}
    wide |= {"student_features": [each.float() for each in half["student_features"]], "centre": CENTRE.float()}
    assert torch.equal(terms.loss, terms_of(wide).loss)


def on_this_rank() -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for what all logits of the student are multiplied by, of this rank's images."""
    inputs = case()
    scale = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)

    def part(x: Tensor) -> Tensor:
        return rank_slice(x, rank(), world_size())

    mine = {key: part(inputs[key].transpose(0, 1)).transpose(0, 1) for key in ("teacher", "teacher_features")}
    mine["student"] = rows_of([part(each) for each in crops(CLASSES, seed=0)]) * scale
    mine["student_features"] = [part(each) for each in inputs["student_features"]]
    loss = terms_of({**inputs, **mine}).loss
    loss.backward()
    assert scale.grad is not None
    return loss.detach(), scale.grad


def test_e7_ranks_equal_one_process() -> None:
    loss, gradient = on_this_rank()
    results = run_on_ranks(2, on_this_rank)  # two images and one
    assert all(math.isclose(float(each), float(loss), rel_tol=1e-12) for each, _ in results)
    average = torch.stack([each for _, each in results]).mean(0)
    torch.testing.assert_close(average, gradient, rtol=1e-10, atol=1e-14)  # float64, other order of sums
