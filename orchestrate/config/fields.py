"""Types of single keys that several sections share."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from orchestrate.config.budget import Budget, BudgetField

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Url = Annotated[str, Field(min_length=1)]


def _above_zero(budget: Budget) -> Budget:
    if budget.amount <= 0:
        raise ValueError("must be more than 0")
    return budget


def _of_known_length(budget: Budget) -> Budget:
    if budget.unit in ("gpuh", "%"):
        raise ValueError("a schedule needs a length in ep, img or step; GPU-hours belong in a sweep's limits")
    return budget


def _no_gpu_hours(budget: Budget) -> Budget:
    if budget.unit == "gpuh":
        raise ValueError("write ep, img, step or a part such as 10%")
    return budget


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same_or_amount(value: Any) -> float | Literal["same"]:
    if value == "same":
        return "same"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("must be a number of at least 0, or `same`")
    return float(value)


def _all_or_count(value: Any) -> int | Literal["all"]:
    if value == "all":
        return "all"
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError("must be a number of images above 0, or `all`")
    return value


Length = Annotated[BudgetField, AfterValidator(_above_zero), AfterValidator(_of_known_length)]
"""A budget above 0 that is a number of steps once the dataset is known."""
Part = Annotated[BudgetField, AfterValidator(_no_gpu_hours)]
"""A length that may also be a percentage of the training's budget, and 0."""
PositivePart = Annotated[Part, AfterValidator(_above_zero)]
Parts = Annotated[tuple[PositivePart, ...], BeforeValidator(_as_tuple)]
SameOrAmount = Annotated[float | Literal["same"], PlainValidator(_same_or_amount)]
AllOrCount = Annotated[int | Literal["all"], PlainValidator(_all_or_count)]
