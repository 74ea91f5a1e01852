"""Barlow Twins: redundancy reduction between the features of two views."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm, world_size
from ssl_methods.heads import build_projector
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.barlow_twins import barlow_twins_loss, sampling_floor
from ssl_methods.method import Method, StepOutput, pair


class BarlowTwins(Method):
    """Train a backbone and a three-layer projector to decorrelate features across two views.

    The views go through the network one after the other, so batch norm sees each view's own moments.

    Args:
        backbone: network to train.
        embed_dim: width of all three projector layers (the paper's dimension sweep widens all three).
        off_diagonal: weight of the redundancy term (lambda). The authors' code has 0.0051, the paper's text 0.005.
        loss_scale: constant factor on the loss. Our gradient is exact; the authors' is divided by their number of
            ranks (16 by their README, 32 by the paper), which LARS hides for matrices but not for biases and batch
            norm. 1/16 or 1/32 reproduces their update on any number of ranks.

    Differs:
        - The gradient is that of one process; the authors' is divided by their number of ranks (`loss_scale`).

    Source: Zbontar et al. 2021, arXiv:2103.03230.
    """

    equation: ClassVar[str] = "L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2  (eq. 1)"
    default_views: ClassVar[str] = "barlow_twins"

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 8192,
        off_diagonal: Annotated[float, Ge(0)] = 0.0051,
        loss_scale: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        super().__init__(backbone)
        self.projector = build_projector([backbone.embed_dim, embed_dim, embed_dim, embed_dim])
        self.off_diagonal = off_diagonal
        self.loss_scale = loss_scale
        synchronise_batch_norm(self)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the scaled loss; metrics are not scaled."""
        z1, z2 = (self.projector(self.backbone(view)) for view in pair(views))
        terms = barlow_twins_loss(z1, z2, off_diagonal=self.off_diagonal)
        return StepOutput(
            loss=self.loss_scale * terms.loss,
            metrics={
                "invariance": terms.invariance.detach(),
                "redundancy": terms.redundancy.detach(),
                "loss_per_dim": terms.loss.detach() / z1.shape[1],
                "sampling_floor": torch.full_like(terms.loss.detach(), self._sampling_floor(z1)),
                "embedding_std": embedding_std(z1),
            },
        )

    def _sampling_floor(self, z: Tensor) -> float:
        return sampling_floor(z.shape[1], len(z) * world_size(), off_diagonal=self.off_diagonal)
