"""What methods share that learn from a slow teacher's class distributions of large crops (DINO, EsViT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_methods.method import Progress
from ssl_methods.schedules import cosine, linear

NUM_LARGE = 2  # views that the teacher sees


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


def check_large_views(num_views: int) -> None:
    """Refuse recipes without two large views.

    Raises:
        ValueError: there are fewer views.
    """
    if num_views < NUM_LARGE:
        raise ValueError(f"views: this method takes 2 large ones and any small ones, the recipe makes {num_views}")


def batches_by_size(views: Sequence[Float[Tensor, "batch 3 _ _"]]) -> list[Float[Tensor, "_ 3 _ _"]]:
    """Join views of one size that follow each other into one batch."""
    return [torch.cat(list(same)) for _, same in groupby(views, key=lambda view: view.shape)]


def by_view(rows: Float[Tensor, "rows dim"], num_views: int) -> Float[Tensor, "views batch dim"]:
    """Give each view an entry of its own again."""
    return rows.view(num_views, -1, rows.shape[-1])
