"""VICReg: variance, invariance and covariance of two views' features."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.heads import build_projector
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.vicreg import vicreg_loss
from ssl_methods.method import Method, StepOutput, pair


class VICReg(Method):
    """Train a backbone and an expander to equal views, features that vary, and features that do not vary together.

    The views go through the network one after the other, so batch norm sees each view's own moments.

    Args:
        backbone: network to train.
        embed_dim: width of all three layers of the expander.
        invariance: weight of the squared difference between the views (lambda).
        variance: weight of the hinge that keeps each feature's standard deviation above 1 (mu).
        covariance: weight of the squared covariances of different features (nu).

    Differs:
        - Linear layers whose bias a batch norm would cancel have none.

    Source: Bardes et al. 2022, arXiv:2105.04906; the terms are averaged as in the authors' code, see `vicreg_loss`.
    """

    equation: ClassVar[str] = (
        "L = lambda mean (z1 - z2)^2 + mu mean max(0, 1 - std z) + nu sum_{i != j} Cov_ij^2 / dim  (eq. 6)"
    )
    default_views: ClassVar[str] = "vicreg"

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 8192,
        invariance: Annotated[float, Ge(0)] = 25.0,
        variance: Annotated[float, Ge(0)] = 25.0,
        covariance: Annotated[float, Ge(0)] = 1.0,
    ) -> None:
        super().__init__(backbone)
        self.projector = build_projector([backbone.embed_dim, embed_dim, embed_dim, embed_dim])
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        synchronise_batch_norm(self)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the weighted sum; the terms among the metrics are not weighted."""
        z1, z2 = (self.projector(self.backbone(view)) for view in pair(views))
        terms = vicreg_loss(z1, z2, **self.weights)
        return StepOutput(
            loss=terms.loss,
            metrics={
                "invariance": terms.invariance.detach(),
                "variance": terms.variance.detach(),
                "covariance": terms.covariance.detach(),
                "embedding_std": embedding_std(z1),
            },
        )
