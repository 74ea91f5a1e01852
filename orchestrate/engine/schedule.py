"""Learning-rate schedules: pure functions of the step, so that a resumed run only needs the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to 1, then `kind` down to `final_fraction`.

    Attributes:
        total_steps: optimizer steps of the whole budget.
        warmup_steps: steps before the peak; fewer than `total_steps`.
        kind: `cosine` or `constant`.
        final_fraction: of the peak, at the end of a cosine.

    Source: Zbontar et al. 2021, arXiv:2103.03230, sec. 2.2 (warm-up, then cosine to 0.001 of the peak, per step).
    """

    total_steps: int
    warmup_steps: int = 0
    kind: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.001

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by at a 0-based step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return cosine + self.final_fraction * (1 - cosine)
