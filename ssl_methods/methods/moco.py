"""MoCo v2: contrast an image's two views with a queue of earlier images."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import gather, rank, shared_permutation, world_size
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.heads import build_mlp
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.queue import NegativeQueue


class MoCo(Method):
    """Train a query encoder to find an image's key, made by its slow twin, among the keys of earlier images.

    Batch norm sees one rank's part of the batch. The parts that the twin sees are shuffled over the ranks, so that
    a query and its key do not share moments that would give the answer away. The global batch divides the queue.

    Args:
        backbone: network to train.
        embed_dim: width of the embedding.
        hidden_dim: width of the projector's hidden layer (authors: the backbone's width, 2048 for a ResNet-50).
        queue_size: number of negatives (K).
        momentum: share of itself that the twin keeps in a step (m).
        temperature: divides the cosine similarities (tau; 0.2 in v2, 0.07 in v1).

    Source: Chen et al. 2020, arXiv:2003.04297 (v2); He et al. 2020, arXiv:1911.05722.
    """

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
        self.key_backbone = build_twin(self.backbone)
        self.key_projector = build_twin(self.projector)
        self.queue = NegativeQueue(embed_dim, queue_size)
        self.momentum = momentum
        self.temperature = temperature

    def check_batches(self, *, num_views: int, global_batch: int) -> None:
        """Refuse a global batch that does not divide the queue."""
        self.queue.check_batch(global_batch)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the contrastive loss against the queue of the steps before, then put this step's keys into it."""
        first, second = pair(views)
        queries = self.projector(self.backbone(first))
        all_keys = self._encode_keys(second)
        keys = all_keys.chunk(world_size())[rank()]
        terms = info_nce_loss(queries, keys, self.queue.negatives(), temperature=self.temperature)
        self.queue.enqueue(all_keys)
        return StepOutput(
            loss=terms.loss,
            metrics={
                "info_nce": terms.loss.detach(),
                "contrast_accuracy": terms.accuracy,
                "positive_similarity": F.cosine_similarity(queries.detach().float(), keys.float()).mean(),
                "embedding_std": embedding_std(queries),
            },
        )

    def after_step(self, progress: Progress) -> None:
        """Move the twin towards the query encoder.

        The paper does so before it encodes a step's keys, from the weights before that step's update. Those are the
        weights after the step before: all that moves is the very first update, and it would change nothing, since the
        twin starts as a copy.
        """
        update_twin(self.key_backbone, self.backbone, momentum=self.momentum)
        update_twin(self.key_projector, self.projector, momentum=self.momentum)

    @torch.no_grad()
    def _encode_keys(self, view: Tensor) -> Tensor:
        """Return the keys of the global batch in rank order, each made among images from all ranks."""
        if world_size() == 1:
            return self._keys_of(view)
        order = shared_permutation(len(view) * world_size(), device=view.device)
        mine = order.chunk(world_size())[rank()]
        shuffled = torch.empty_like(view).copy_(gather(view)[mine])  # in the view's own memory layout
        return gather(self._keys_of(shuffled))[order.argsort()]

    def _keys_of(self, images: Tensor) -> Tensor:
        keys: Tensor = self.key_projector(self.key_backbone(images))
        return keys
