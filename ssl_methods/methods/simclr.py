"""SimCLR: contrast two views of an image with all other images of the batch."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.heads import build_projector
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.nt_xent import nt_xent_loss
from ssl_methods.method import Method, StepOutput, pair


class SimCLR(Method):
    """Train a backbone and a two-layer projector to find an image's other view in the global batch.

    Both views go through the network as one batch, as in the authors' code. The projector is that of their released
    code: Linear - BN - ReLU - Linear - BN (the paper's text leaves the batch norms out).

    Args:
        backbone: network to train.
        embed_dim: width of the embedding (paper: 128).
        hidden_dim: width of the projector's hidden layer (authors: the backbone's width, 2048 for a ResNet-50).
        temperature: divides the cosine similarities (tau; paper: 0.1 on ImageNet, 0.5 on CIFAR-10).

    Differs:
        - Linear layers whose bias a batch norm would cancel have none.
        - No linear classifier is trained beside it.

    Source: Chen et al. 2020, arXiv:2002.05709.
    """

    equation: ClassVar[str] = (
        "L = -mean_i log [exp(cos(z_i, z_j) / tau) / sum_{k != i} exp(cos(z_i, z_k) / tau)], "
        "j the other view of i  (eq. 1)"
    )
    default_views: ClassVar[str] = "simclr"

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 128,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        temperature: Annotated[float, Gt(0)] = 0.1,
    ) -> None:
        super().__init__(backbone)
        self.projector = nn.Sequential(
            *build_projector([backbone.embed_dim, hidden_dim, embed_dim]), nn.BatchNorm1d(embed_dim)
        )
        self.temperature = temperature
        synchronise_batch_norm(self)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the contrastive loss."""
        z1, z2 = self.projector(self.backbone(torch.cat(pair(views)))).chunk(2)
        loss = nt_xent_loss(z1, z2, temperature=self.temperature)
        return StepOutput(
            loss=loss,
            metrics={
                "nt_xent": loss.detach(),
                "positive_similarity": F.cosine_similarity(z1.detach().float(), z2.detach().float()).mean(),
                "embedding_std": embedding_std(z1),
            },
        )
