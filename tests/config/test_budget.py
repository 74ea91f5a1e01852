import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate.config.budget import Budget


@pytest.mark.parametrize(
    ("text", "steps"),
    [("20ep", 200), ("0.5ep", 5), ("5kimg", 50), ("10kstep", 10_000), ("1img", 1), ("0ep", 0), ("1.5kstep", 1500)],
)
def test_budget_converts_to_steps(text: str, steps: int) -> None:
    assert Budget.parse(text).steps(num_samples=1000, global_batch=100) == steps


def test_percent_is_a_part_of_another_budget() -> None:
    assert Budget.parse("10%").steps(num_samples=1000, global_batch=100, whole=250) == 25


@pytest.mark.parametrize("text", ["20", "ep", "20 epochs", "-1ep", "1e3ep", "", "20mimg", "20EP", "٣ep"])
def test_text_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="with a unit"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["9" * 400 + "ep", "9999999999999Gimg"])
def test_amount_beyond_all_machines_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be at most 1e\\+18"):
        Budget.parse(text)


def test_gpu_hours_have_no_steps() -> None:
    with pytest.raises(ValueError, match="no known number of steps"):
        Budget.parse("8gpuh").steps(num_samples=10, global_batch=1)


@given(st.integers(0, 10**9), st.sampled_from(["ep", "img", "step", "gpuh"]))
def test_canonical_form_reads_back(amount: int, unit: str) -> None:
    budget = Budget.parse(f"{amount}{unit}")
    assert Budget.parse(str(budget)) == budget
