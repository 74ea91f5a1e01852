"""Large and small crops of an image: which are large, and batches of those of one size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

NUM_LARGE = 2  # views that come first: those that a teacher sees, or whose codes are predicted


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
