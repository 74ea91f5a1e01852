"""SwAV: swapped prediction of cluster assignments between crops."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import gather, rank, synchronise_batch_norm, world_size
from ssl_methods.heads import UnitLinear, build_projector
from ssl_methods.indicators import embedding_std, entropy
from ssl_methods.losses.swav import sinkhorn, swav_loss
from ssl_methods.method import Method, Progress, StepOutput
from ssl_methods.multi_crop import NUM_LARGE, batches_by_size, check_large_views
from ssl_methods.queue import NegativeQueue


class SwAV(Method):
    """Train crops to predict to which prototypes another, large crop of the image is assigned.

    The first two views are the large ones; only these get codes, all views predict them. Codes spread the global batch
    evenly over the prototypes; small batches want a queue of earlier embeddings beside them, one for each large crop,
    which counts for the codes alone. Views of one size that follow each other go through the network as one batch.
    The authors hold the prototypes still for the first epoch: `optim.freeze_last_layer: 1ep`.

    Args:
        backbone: network to train.
        embed_dim: width of the embedding.
        hidden_dim: width of the projector's hidden layer (authors: 2048 for a ResNet-50).
        num_prototypes: number of learnt directions (K).
        temperature: divides the cosines in the predictions (tau).
        epsilon: smoothness of the codes.
        sinkhorn_iterations: how often samples and prototypes are scaled to equal sums.
        queue_size: earlier embeddings of each large crop, of all ranks together; 0 for none, else the global batch
            divides it. The authors have none at a global batch of 4096, and 3840 at 256.
        queue_from_epoch: when the queue begins to be filled; once full, it is used.

    Differs:
        - The prototypes' gradient has no part along them, which would only change their length. The authors' has, and
          like ours their prototypes are set back to unit length for each step: the same to first order.
        - Under ZeRO 3 the lengths are left to grow, which slows the prototypes' turning a little.
        - The queue holds the embeddings of all ranks in rank order, and is split over them for the codes; the authors'
          ranks keep one each of their own.
        - No Linear layer has a bias. The authors' projector has two, of which the batch norm cancels the first.

    Source: Caron et al. 2020, arXiv:2006.09882; values of its multi-crop recipe.
    """

    equation: ClassVar[str] = (
        "L = mean over pairs of crops of -sum_k q_k log softmax_k(z c_k / tau), q = Sinkhorn(z' c / epsilon)  (eq. 2-6)"
    )
    default_views: ClassVar[str] = "swav"
    num_views: ClassVar[int] = 0
    has_last_layer: ClassVar[bool] = True

    num_queued: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 128,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        num_prototypes: Annotated[int, Gt(1)] = 3000,
        temperature: Annotated[float, Gt(0)] = 0.1,
        epsilon: Annotated[float, Gt(0)] = 0.05,
        sinkhorn_iterations: Annotated[int, Ge(1)] = 3,
        queue_size: Annotated[int, Ge(0)] = 0,
        queue_from_epoch: Annotated[float, Ge(0)] = 15.0,
    ) -> None:
        super().__init__(backbone)
        self.projector = build_projector([backbone.embed_dim, hidden_dim, embed_dim])
        self.prototypes = UnitLinear(embed_dim, num_prototypes)
        self.prototypes.reset_lengths()
        num_queues = NUM_LARGE if queue_size > 0 else 0
        self.queues = nn.ModuleList(NegativeQueue(embed_dim, queue_size) for _ in range(num_queues))
        # embeddings in a queue; a tensor, so that the GPU need not be waited for
        self.register_buffer("num_queued", torch.zeros((), dtype=torch.int64))
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.queue_size = queue_size
        self.queue_from_epoch = queue_from_epoch
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))
        synchronise_batch_norm(self)

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse recipes without two large views, and a global batch that does not divide the queue."""
        check_large_views(num_views)
        for queue in self._queues():
            queue.check_batch(global_batch)

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say so where codes spread few samples over many prototypes."""
        num_samples, num_prototypes = global_batch + self.queue_size, len(self.prototypes.weight)
        if num_samples >= num_prototypes:
            return ()
        return (
            f"method.num_prototypes: {num_prototypes} for codes of {num_samples} samples; use fewer, or a longer "
            "method.queue_size (the authors: 3000 for 4096)",
        )

    def before_step(self, progress: Progress) -> None:
        """Say whether the queue takes part."""
        self.queueing = progress.epochs >= self.queue_from_epoch

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the loss under the codes of batch and queue, then put the large crops' embeddings into the queue."""
        batch = len(views[0])
        self.check_batches(num_views=len(views), global_batch=batch * world_size())
        features = torch.cat([self.backbone(same) for same in batches_by_size(views)])
        embeddings = F.normalize(self.projector(features), dim=1)
        scores = self.prototypes(embeddings).view(len(views), batch, -1)
        codes = self._codes(scores[:NUM_LARGE].detach())
        loss = swav_loss(scores, codes, temperature=self.temperature)
        self._enqueue(embeddings[: NUM_LARGE * batch].detach().chunk(NUM_LARGE))
        return StepOutput(
            loss=loss,
            metrics={
                "swav": loss.detach(),
                "code_entropy": entropy(codes).mean(),
                "embedding_std": embedding_std(embeddings[:batch]),
            },
        )

    def after_step(self, progress: Progress) -> None:
        """Set the prototypes back to unit length."""
        self.prototypes.reset_lengths()

    def last_layer(self) -> tuple[nn.Parameter, ...]:
        """Return the prototypes; the authors hold them still for the first epoch."""
        return (self.prototypes.weight,)

    @torch.no_grad()
    def _codes(self, scores: Float[Tensor, "large batch prototypes"]) -> Float[Tensor, "large batch prototypes"]:
        """Assign this rank's samples, among those of all ranks and, once it is full, the queue."""
        batch = scores.shape[1]
        if self.queueing and self.queue_size > 0:
            # the queue is the same on all ranks, each takes its part of it
            mine = [queue.keys.tensor_split(world_size())[rank()] for queue in self._queues()]
            queued = torch.stack([self.prototypes(keys).to(scores.dtype) for keys in mine])
            queued.masked_fill_(self.num_queued < self.queue_size, -torch.inf)
            scores = torch.cat([scores, queued], dim=1)
        codes: Tensor = sinkhorn(scores, epsilon=self.epsilon, iterations=self.sinkhorn_iterations)
        return codes[:, :batch]

    @torch.no_grad()
    def _enqueue(self, embeddings: Sequence[Float[Tensor, "batch embed_dim"]]) -> None:
        """Put the large crops' embeddings of all ranks into their queues, once these take part."""
        if not (self.queueing and self.queue_size > 0):
            return
        for queue, mine in zip(self._queues(), embeddings, strict=True):
            queue.enqueue(gather(mine))
        self.num_queued.add_(len(embeddings[0]) * world_size()).clamp_(max=self.queue_size)

    def _queues(self) -> list[NegativeQueue]:
        return [queue for queue in self.queues if isinstance(queue, NegativeQueue)]
