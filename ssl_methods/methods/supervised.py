"""Supervised classification: the yardstick of the other methods."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.cross_entropy import cross_entropy_loss
from ssl_methods.method import Method, StepOutput


class Supervised(Method):
    """Train a backbone and a linear classifier with labels; several views of an image all count.

    Args:
        backbone: network to train.
        num_classes: number of labels.
        label_smoothing: share of the target spread evenly over all classes.

    Differs:
        - Batch norms see the global batch; in torchvision's training script they see one rank's part.

    Source: He et al. 2016, arXiv:1512.03385; Szegedy et al. 2016, arXiv:1512.00567 (label smoothing).
    """

    equation: ClassVar[str] = "L = -mean_i sum_c y_ic log softmax_c(W f(x_i) + b)"
    default_views: ClassVar[str] = "supervised"
    num_views: ClassVar[int] = 0
    uses_labels: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: Annotated[int, Gt(1)],
        label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        super().__init__(backbone)
        self.classifier = nn.Linear(backbone.embed_dim, num_classes)
        self.label_smoothing = label_smoothing
        synchronise_batch_norm(self)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the cross-entropy.

        Raises:
            ValueError: no labels were given.
        """
        if labels is None:
            raise ValueError("supervised needs labels: read the data with labels")
        features = torch.cat([self.backbone(view) for view in views])
        logits = self.classifier(features)
        targets = labels.repeat(len(views))
        loss = cross_entropy_loss(logits, targets, label_smoothing=self.label_smoothing)
        return StepOutput(
            loss=loss,
            metrics={
                "cross_entropy": loss.detach(),
                "top1": (logits.argmax(dim=1) == targets).float().mean(),
                "embedding_std": embedding_std(features),
            },
        )
