"""BYOL: predict what a slow twin makes of the other view."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.heads import build_projector
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.negative_cosine import negative_cosine_loss
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.schedules import cosine


class BYOL(Method):
    """Train a backbone, a projector and a predictor to predict the twin's projection of the other view.

    The views go through both networks one after the other, so batch norm sees each view's own moments. There are no
    negatives: the predictor and the slow twin keep the embeddings from collapsing.

    Args:
        backbone: network to train.
        embed_dim: width of the projections and predictions.
        hidden_dim: width of the hidden layer of projector and predictor.
        momentum: share of itself that the twin keeps in the first step (tau); it grows to 1 along a cosine. The paper
            has 0.996 for 1000 epochs, 0.99 for 300 and 0.97 for 100.

    Differs:
        - Batch norms keep their running moments with torch's momentum of 0.1, as the backbone's own do.
        - Linear layers whose bias a batch norm would cancel have none.
        - No linear classifier is trained beside it.

    Source: Grill et al. 2020, arXiv:2006.07733.
    """

    equation: ClassVar[str] = "L = sum over both directions of |p / |p| - z' / |z'||^2 = 2 - 2 cos(p, z')  (eq. 2)"
    default_views: ClassVar[str] = "byol"
    has_twin: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 256,
        hidden_dim: Annotated[int, Gt(0)] = 4096,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.996,
    ) -> None:
        super().__init__(backbone)
        self.projector = build_projector([backbone.embed_dim, hidden_dim, embed_dim])
        self.predictor = build_projector([embed_dim, hidden_dim, embed_dim])
        self.target_backbone = build_twin(self.backbone)
        self.target_projector = build_twin(self.projector)
        self.first_momentum = momentum
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))
        synchronise_batch_norm(self)

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say so where the global batch is smaller than those with which the paper saw no loss."""
        if global_batch >= 256:
            return ()
        return (f"train.global_batch: {global_batch}; the paper's results fall below 256, where batch norm gets noisy",)

    def before_step(self, progress: Progress) -> None:
        """Set the twin's momentum."""
        self.momentum = cosine(self.first_momentum, 1.0, progress=progress.fraction)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the sum of both directions' squared distances, each averaged over the global batch."""
        projections = [self.projector(self.backbone(view)) for view in pair(views)]
        with torch.no_grad():
            targets = [self.target_projector(self.target_backbone(view)) for view in views]
        similarities = [
            -negative_cosine_loss(self.predictor(projection), target)
            for projection, target in zip(projections, reversed(targets), strict=True)
        ]
        loss = (2 - 2 * similarities[0]) + (2 - 2 * similarities[1])
        return StepOutput(
            loss=loss,
            metrics={
                "regression": loss.detach(),
                "target_similarity": (similarities[0] + similarities[1]).detach() / 2,
                "embedding_std": embedding_std(projections[0]),
            },
        )

    def after_step(self, progress: Progress) -> None:
        """Move the twin towards the trained network."""
        update_twin(self.target_backbone, self.backbone, momentum=self.momentum)
        update_twin(self.target_projector, self.projector, momentum=self.momentum)
