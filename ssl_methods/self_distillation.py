"""What methods share that learn from a slow teacher's class distributions of large crops (DINO, EsViT)."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_methods.method import Progress
from ssl_methods.schedules import cosine, linear


@dataclass(frozen=True)
class TeacherSchedule:
    """How the teacher's momentum and temperature move.

    Attributes:
        momentum: share of itself that the teacher keeps in the first step; it grows to 1 along a cosine.
        temperature: at the end of the warm-up, and from then on.
        initial_temperature: at the first step.
        warmup_epochs: in which it moves on a straight line.
    """

    momentum: float
    temperature: float
    initial_temperature: float
    warmup_epochs: float

    def momentum_at(self, progress: Progress) -> float:
        """Return the share that the teacher keeps of itself in the next step."""
        return cosine(self.momentum, 1.0, progress=progress.fraction)

    def temperature_at(self, progress: Progress) -> float:
        """Return what divides the teacher's logits in the next step."""
        warm = progress.epochs / self.warmup_epochs if self.warmup_epochs > 0 else 1.0
        return linear(self.initial_temperature, self.temperature, progress=warm)
