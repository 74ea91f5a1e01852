"""Momentum contrast: keys from a slow twin, shuffled over the ranks, against a queue of earlier keys."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import gather, rank, shared_permutation, world_size
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.method import StepOutput
from ssl_methods.queue import NegativeQueue


class MomentumContrast(nn.Module):
    """The twin of an encoder and its queue; the encoder itself stays with the method that trains it.

    Batch norm sees one rank's part of the batch. The parts that the twin sees are shuffled over the ranks, so that
    a query and its key do not share moments that would give the answer away. The global batch divides the queue.

    Args:
        backbone, projector: the encoder whose twin makes the keys.
        embed_dim: width of the embedding.
        queue_size: number of negatives (K).
        momentum: share of itself that the twin keeps in a step (m).
        temperature: divides the cosine similarities (tau).

    Source: He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297.
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: nn.Module,
        *,
        embed_dim: int,
        queue_size: int,
        momentum: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.backbone = build_twin(backbone)
        self.projector = build_twin(projector)
        self.queue = NegativeQueue(embed_dim, queue_size)
        self.momentum = momentum
        self.temperature = temperature

    def forward(self, queries: Float[Tensor, "batch embed_dim"], view: Float[Tensor, "batch 3 _ _"]) -> StepOutput:
        """Return the contrastive loss against the queue of the steps before, then put this step's keys into it.

        Args:
            queries: of the encoder, of any length.
            view: the other view of the same images.
        """
        all_keys = self._encode(view)
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

    def follow(self, encoder: Sequence[nn.Module]) -> None:
        """Move the twin towards the encoder, its backbone and its projector; after the optimizer's step.

        The paper does so before it encodes a step's keys, from the weights before that step's update. Those are the
        weights after the step before: all that moves is the very first update, and it would change nothing, since the
        twin starts as a copy.
        """
        for twin, online in zip((self.backbone, self.projector), encoder, strict=True):
            update_twin(twin, online, momentum=self.momentum)

    @torch.no_grad()
    def _encode(self, view: Tensor) -> Tensor:
        """Return the keys of the global batch in rank order, each made among images from all ranks."""
        if world_size() == 1:
            return self._keys_of(view)
        order = shared_permutation(len(view) * world_size(), device=view.device)
        mine = order.chunk(world_size())[rank()]
        shuffled = torch.empty_like(view).copy_(gather(view)[mine])  # in the view's own memory layout
        return gather(self._keys_of(shuffled))[order.argsort()]

    def _keys_of(self, images: Tensor) -> Tensor:
        keys: Tensor = self.projector(self.backbone(images))
        return keys
