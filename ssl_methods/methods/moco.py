"""MoCo v2: contrast an image's two views with a queue of earlier images."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.heads import build_mlp
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.momentum_contrast import MomentumContrast


class MoCo(Method):
    """Train a query encoder to find an image's key, made by its slow twin, among the keys of earlier images.

    Args:
        backbone: network to train.
        embed_dim: width of the embedding.
        hidden_dim: width of the projector's hidden layer (authors: the backbone's width, 2048 for a ResNet-50).
        queue_size: number of negatives (K); the global batch divides it.
        momentum: share of itself that the twin keeps in a step (m).
        temperature: divides the cosine similarities (tau; 0.2 in v2, 0.07 in v1).

    Differs:
        - The twin moves after the optimizer's step instead of before the next, which is the same.

    Source: Chen et al. 2020, arXiv:2003.04297 (v2); He et al. 2020, arXiv:1911.05722.
    """

    equation: ClassVar[str] = (
        "L = -mean_i log [exp(q_i k_i / tau) / (exp(q_i k_i / tau) + sum_j exp(q_i n_j / tau))]  (eq. 1)"
    )
    default_views: ClassVar[str] = "moco_v2"
    rank_bound: ClassVar[tuple[str, ...]] = ("batch norm sees one rank's part of the batch",)
    has_twin: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 128,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        queue_size: Annotated[int, Gt(0)] = 65536,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.999,
        temperature: Annotated[float, Gt(0)] = 0.2,
    ) -> None:
        super().__init__(backbone)
        self.projector = build_mlp([backbone.embed_dim, hidden_dim, embed_dim], activation=nn.ReLU)
        self.contrast = MomentumContrast(
            self.backbone,
            self.projector,
            embed_dim=embed_dim,
            queue_size=queue_size,
            momentum=momentum,
            temperature=temperature,
        )

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse a global batch that does not divide the queue."""
        self.contrast.queue.check_batch(global_batch)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the contrastive loss against the queue of the steps before, then put this step's keys into it."""
        first, second = pair(views)
        output: StepOutput = self.contrast(self.projector(self.backbone(first)), second)
        return output

    def after_step(self, progress: Progress) -> None:
        """Move the twin towards the query encoder."""
        self.contrast.follow((self.backbone, self.projector))
