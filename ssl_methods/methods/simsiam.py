"""SimSiam: predict the other view, with a stop-gradient in place of a twin."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.heads import build_projector
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.negative_cosine import negative_cosine_loss
from ssl_methods.method import Method, StepOutput, pair


class SimSiam(Method):
    """Train a backbone, a projector and a predictor to predict the projection of the other view.

    The views go through the network one after the other, so batch norm sees each view's own moments. There are
    neither negatives nor a twin: the projection that is predicted gets no gradient.

    Args:
        backbone: network to train.
        embed_dim: width of the projections and predictions.
        hidden_dim: width of the projector's two hidden layers (authors: the backbone's width, 2048 for a ResNet-50).
        bottleneck_dim: width of the predictor's hidden layer, a quarter of `embed_dim` in the paper.

    Differs:
        - The predictor's learning rate follows the schedule of all others; the authors' code can hold it constant,
          which they found a little better.
        - Linear layers whose bias a batch norm would cancel have none.

    Source: Chen and He 2020, arXiv:2011.10566.
    """

    equation: ClassVar[str] = "L = -1/2 cos(p1, stop(z2)) - 1/2 cos(p2, stop(z1))  (eq. 4)"
    default_views: ClassVar[str] = "simsiam"

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 2048,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        bottleneck_dim: Annotated[int, Gt(0)] = 512,
    ) -> None:
        super().__init__(backbone)
        self.projector = nn.Sequential(
            *build_projector([backbone.embed_dim, hidden_dim, hidden_dim, embed_dim]),
            nn.BatchNorm1d(embed_dim, affine=False),
        )
        hidden = build_projector([embed_dim, bottleneck_dim, embed_dim])[:-1]
        self.predictor = nn.Sequential(*hidden, nn.Linear(bottleneck_dim, embed_dim))
        synchronise_batch_norm(self)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return minus the mean cosine of both directions."""
        z1, z2 = (self.projector(self.backbone(view)) for view in pair(views))
        first = negative_cosine_loss(self.predictor(z1), z2)
        second = negative_cosine_loss(self.predictor(z2), z1)
        loss = (first + second) / 2
        return StepOutput(
            loss=loss,
            metrics={"negative_cosine": loss.detach(), "embedding_std": embedding_std(z1)},
        )
