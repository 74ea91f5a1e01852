"""Truncated triplet: predict a slow target's embedding of the other view, away from a deputy of the negatives."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.truncated_triplet import (
    TruncatedTripletLoss,
    median_rank,
    safe_rank,
    true_negative_probability,
    truncated_triplet_loss,
)
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.randomness import uniforms
from ssl_methods.schedules import cosine

PUBLISHED_BATCH = 196  # images a rank
SAFE = 0.9  # a deputy should be of another class with this probability


class Triplet(Method):
    """Train a predictor to find the other view's embedding by a slow target, with hard negatives that skip the hardest.

    The hardest negatives are likely of the anchor's own class; the deputy averages those behind them. Which ranks are
    safe depends on the number of negatives and of classes: `orchestrate plan` says so. Both networks see the views
    at random resolutions, four a step, the same on all ranks.

    Args:
        backbone: network to train.
        embed_dim: width of the embedding.
        hidden_dim: width of the hidden layer of projector and predictor.
        deputy: `mean_ranks` averages the negatives from `first_rank` to `last_rank` (the authors' "smoothed rank-k"),
            `rank` takes that of `first_rank` alone, `median` the lower median.
        first_rank: counted from 1, the hardest.
        last_rank: of `mean_ranks`; a rank's batch holds more images.
        gamma: weight of the positive's distance against the deputy's.
        margin: of the hinge. From 6 on (gamma 2) it never closes: a constant, out of `loss_minus_constant`.
        momentum: share of itself that the target keeps in the first step; it grows to 1 along a cosine.
        resolution_min_online: side of the smallest images that the trained network sees, as a share of the view's.
            Sides are drawn evenly from there to the whole side. 1 for backbones that take one size only.
        resolution_min_target: the same for the target.
        num_classes: of the images, by guess; only advice on the ranks follows from it.

    Differs:
        - Sizes are a function of the step; the authors draw them from a generator that starts at 0 in every run.
        - The backbone starts as everywhere here, its last batch norms at 0; the authors' do not.
        - The target's momentum follows optimizer steps; the authors count the batches that are accumulated, too.

    Source: Wang et al. 2021, arXiv:2104.08760; ranks, gamma, margin and resolutions of the authors' code.
    """

    equation: ClassVar[str] = (
        "L = sum over both directions of mean_i max(0, gamma d_ii - mean_{k=a..b} d_i(k) + margin)"
    )
    default_views: ClassVar[str] = "triplet"
    rank_bound: ClassVar[tuple[str, ...]] = ("negatives are those of one rank's part of the batch",)
    has_twin: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 256,
        hidden_dim: Annotated[int, Gt(0)] = 4096,
        deputy: Literal["mean_ranks", "rank", "median"] = "mean_ranks",
        first_rank: Annotated[int, Ge(1)] = 2,
        last_rank: Annotated[int, Ge(1)] = 10,
        gamma: Annotated[float, Gt(0)] = 2.0,
        margin: Annotated[float, Ge(0)] = 100.0,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.99,
        resolution_min_online: Annotated[float, Gt(0), Le(1)] = 96 / 224,
        resolution_min_target: Annotated[float, Gt(0), Le(1)] = 128 / 224,
        num_classes: Annotated[int, Gt(1)] = 1000,
    ) -> None:
        super().__init__(backbone)
        if deputy == "mean_ranks" and last_rank < first_rank:
            raise ValueError(f"last_rank: {last_rank} comes before first_rank {first_rank}")
        self.projector = _build_head(backbone.embed_dim, hidden_dim, embed_dim)
        self.predictor = _build_head(embed_dim, hidden_dim, embed_dim)
        _initialise(self.projector, self.predictor)
        self.target_backbone = build_twin(self.backbone)
        self.target_projector = build_twin(self.projector)
        self.deputy = deputy
        self.first_rank, self.last_rank = first_rank, last_rank
        self.gamma, self.margin = gamma, margin
        self.first_momentum = momentum
        self.smallest_online, self.smallest_target = resolution_min_online, resolution_min_target
        self.num_classes = num_classes
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))
        synchronise_batch_norm(self)

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse batches in which an image has too few negatives."""
        batch = global_batch // num_ranks
        _, last = self._ranks(batch)
        if batch - 1 < max(last, 1):
            enough = (max(last, 1) + 1) * num_ranks
            raise ValueError(
                f"last_rank: the {last}th hardest negative needs more than the {batch} images that a global batch of "
                f"{global_batch} leaves a rank of {num_ranks}; write a global batch of {enough} or more, or fewer ranks"
            )

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say where the deputy is likely of the anchor's own class, or chosen from far more or fewer negatives."""
        batch = global_batch // num_ranks
        counts = {"num_negatives": batch - 1, "num_classes": self.num_classes}
        first, _ = self._ranks(batch)
        lines = []
        if not PUBLISHED_BATCH / 2 <= batch <= PUBLISHED_BATCH * 2:
            lines.append(f"negatives come from the {batch} images of a rank; published with {PUBLISHED_BATCH}")
        probability = true_negative_probability(first, **counts)
        if probability < SAFE:
            lines.append(
                f"the deputy starts at rank {first} of {batch - 1} negatives: of {self.num_classes} balanced classes "
                f"it is another class's with probability {probability:.2f}, from rank {safe_rank(SAFE, **counts)} on "
                f"with {SAFE} or more; set first_rank and last_rank, or num_classes"
            )
        return tuple(lines)

    def before_step(self, progress: Progress) -> None:
        """Set the target's momentum, and draw the resolutions."""
        self.momentum = cosine(self.first_momentum, 1.0, progress=progress.fraction)
        self.draws = uniforms(0, epoch=0, sample_id=progress.step, view=0, count=4)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the sum of the losses of both directions."""
        first, second = pair(views)
        online_1, online_2, target_2, target_1 = self.draws
        anchors = [self._predict(first, online_1), self._predict(second, online_2)]
        targets = [self._target(second, target_2), self._target(first, target_1)]
        both = [self._loss(*direction) for direction in zip(anchors, targets, strict=True)]
        loss = both[0].loss + both[1].loss
        return StepOutput(
            loss=loss,
            metrics={
                "triplet": loss.detach(),
                "loss_minus_constant": loss.detach() - 2 * self.margin,
                "active": (both[0].active + both[1].active) / 2,
                "positive_similarity": (both[0].positive_similarity + both[1].positive_similarity) / 2,
                "deputy_similarity": (both[0].deputy_similarity + both[1].deputy_similarity) / 2,
                "embedding_std": embedding_std(anchors[0]),
            },
        )

    def after_step(self, progress: Progress) -> None:
        """Move the target towards the trained network."""
        update_twin(self.target_backbone, self.backbone, momentum=self.momentum)
        update_twin(self.target_projector, self.projector, momentum=self.momentum)

    def _predict(self, view: Tensor, draw: float) -> Tensor:
        images = _shrink(view, smallest=self.smallest_online, draw=draw)
        prediction: Tensor = self.predictor(self.projector(self.backbone(images)))
        return prediction

    @torch.no_grad()
    def _target(self, view: Tensor, draw: float) -> Tensor:
        images = _shrink(view, smallest=self.smallest_target, draw=draw)
        embeddings: Tensor = self.target_projector(self.target_backbone(images))
        return embeddings

    def _loss(self, anchors: Tensor, targets: Tensor) -> TruncatedTripletLoss:
        first, last = self._ranks(len(anchors))
        return truncated_triplet_loss(
            anchors, targets, first_rank=first, last_rank=last, gamma=self.gamma, margin=self.margin
        )

    def _ranks(self, batch: int) -> tuple[int, int]:
        """Return the first and last rank of the deputy in a rank's batch."""
        if self.deputy == "median":
            return (median_rank(batch - 1),) * 2
        return self.first_rank, self.first_rank if self.deputy == "rank" else self.last_rank


def _build_head(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Stack Linear - BatchNorm - ReLU - Linear with all biases, as published."""
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, output_dim),
    )


def _initialise(projector: nn.Module, predictor: nn.Module) -> None:
    """Start the projector with Kaiming's normal weights (He et al. 2015), the predictor with std 0.01; biases at 0."""
    for head in (projector, predictor):
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
                if head is projector:
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(layer.weight, std=0.01)


def _shrink(view: Tensor, *, smallest: float, draw: float) -> Tensor:
    """Resize square images to a side between a share of their own and all of it, chosen by a number in [0, 1)."""
    whole = view.shape[-1]
    least = max(1, round(smallest * whole))
    side = least + int(draw * (whole - least + 1))
    if side == whole:
        return view
    return F.interpolate(view, size=(side, side), mode="bilinear", align_corners=False)
