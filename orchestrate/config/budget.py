"""Amounts of training with a unit: `20ep`, `5Mimg`, `10kstep`, `8gpuh`, and `10%` of another budget."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

Unit = Literal["ep", "img", "step", "gpuh", "%"]

_PATTERN = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<prefix>[kMG]?)(?P<unit>ep|img|step|gpuh|%)")
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_MOST = 1e18  # of any unit; beyond it lies only a slip of the finger, and numbers that overflow


@dataclass(frozen=True)
class Budget:
    """What a trial may spend.

    Attributes:
        amount: in units, prefixes resolved; at least 0.
        unit: epochs, images, optimizer steps, GPU-hours, or percent of another budget.
    """

    amount: float
    unit: Unit

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read `20ep`, `1.5ep`, `5Mimg`, `10kstep`, `8gpuh` or `10%`.

        Raises:
            ValueError: the text has no number, no unit or an unknown one, or the amount is beyond all machines.
        """
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError("not an amount with a unit; write 20ep, 5Mimg, 10kstep or (where it says so) 8gpuh, 10%")
        unit: Unit = match["unit"]  # type: ignore[assignment]
        amount = float(match["number"]) * _PREFIXES[match["prefix"]]
        if amount > _MOST:
            raise ValueError(f"must be at most {_MOST:g} {unit}")
        return Budget(amount, unit)

    def __str__(self) -> str:
        """Write the canonical form, which `parse` reads back to an equal budget."""
        if self.unit in ("img", "step"):
            for prefix, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
                if self.amount >= size and self.amount % size == 0:
                    return f"{self.amount / size:g}{prefix}{self.unit}"
        return f"{self.amount:.12g}{self.unit}" if self.amount < 1e12 else f"{self.amount / 1e9:.12g}G{self.unit}"

    def steps(self, *, num_samples: int, global_batch: int, whole: int = 0) -> int:
        """Convert to optimizer steps, rounded to the nearest, at least 1 unless the amount is 0.

        Args:
            num_samples: size of the training set, the length of an epoch.
            global_batch: images an optimizer step consumes over all ranks.
            whole: steps that `%` is a part of.

        Raises:
            ValueError: GPU-hours have no number of steps before the training is measured.
        """
        images_per_unit = {"ep": num_samples, "img": 1, "step": global_batch}
        if self.unit == "%":
            steps = self.amount / 100 * whole
        elif self.unit in images_per_unit:
            steps = self.amount * images_per_unit[self.unit] / global_batch
        else:
            raise ValueError(f"{self}: GPU-hours have no known number of steps; write ep, img or step")
        return max(1, math.floor(steps + 0.5)) if self.amount > 0 else 0


def _validate(value: Any) -> Budget:
    return value if isinstance(value, Budget) else Budget.parse(value)


BudgetField = Annotated[Budget, BeforeValidator(_validate), PlainSerializer(str, return_type=str)]
