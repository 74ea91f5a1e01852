"""DisCo: momentum contrast for a small student whose embeddings a frozen, large teacher shows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.build import Stem
from ssl_methods.heads import build_mlp
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.distillation import distillation_loss
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.momentum_contrast import MomentumContrast
from ssl_methods.teacher import Teacher

PUBLISHED_BATCH = 32  # images a rank


class DisCo(Method):
    """Train a student to put both views where a frozen teacher puts them, and to tell images apart as MoCo does.

    Three encoders: the student, its slow twin that makes the keys ("mean student"), and the teacher. The projector is
    thrown away after training, so that a wider hidden layer is free; too narrow a one is the "distilling bottleneck".

    Args:
        backbone: network to train, the student.
        teacher_weights: path or URL of the teacher's weights: those of a trial here, of the authors' MoCo, or of a
            library; `random` for an untrained teacher, a control.
        teacher: backbone of the teacher: own, torchvision or timm name.
        teacher_stem: of that backbone, as in `backbone.stem`.
        teacher_hidden_dim: width of its projector's hidden layer; 0 for its bare features, `embed_dim` wide.
        teacher_sha256: of the file; empty for no check.
        teacher_bn: whether the teacher's batch norms use the moments they came with, or those of the batch.
        embed_dim: width of the embedding, of student and teacher.
        hidden_dim: width of the student's hidden layer, the distilling bottleneck; 0 for a single Linear.
        distillation_weight: weight of the mean squared distances to the teacher; 32 is the authors' sum over a rank's
            32 images.
        reduction: `mean` over the global batch. `published` puts the size of a rank's batch in place of
            `distillation_weight`: the sum over it, with weight 1.
        contrast_weight: weight of the contrastive loss (lambda); 0 for distillation only, without twin and queue.
        queue_size: number of negatives (K); the global batch divides it.
        momentum: share of itself that the twin keeps in a step (m).
        temperature: divides the cosine similarities (tau).

    Differs:
        - The distillation term is a mean over the global batch: the same on any number of ranks.
        - The teacher is in evaluation mode; the authors' runs in training mode, and its moments move
          (`teacher_bn: train`).
        - The teacher's file must fit name by name; the authors take what fits, the teacher's queue included.

    Source: Gao et al. 2022, arXiv:2104.09124.
    """

    equation: ClassVar[str] = "L = w sum over both views of mean_i ||s(x_i) - t(x_i)||^2 + lambda L_InfoNCE"
    default_views: ClassVar[str] = "disco"
    rank_bound: ClassVar[tuple[str, ...]] = ("batch norm sees one rank's part of the batch",)
    has_twin: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        teacher_weights: str,
        teacher: str = "resnet50",
        teacher_stem: Stem = "default",
        teacher_hidden_dim: Annotated[int, Ge(0)] = 2048,
        teacher_sha256: str = "",
        teacher_bn: Literal["eval", "train"] = "eval",
        embed_dim: Annotated[int, Gt(0)] = 128,
        hidden_dim: Annotated[int, Ge(0)] = 2048,
        distillation_weight: Annotated[float, Ge(0)] = 32.0,
        reduction: Literal["mean", "published"] = "mean",
        contrast_weight: Annotated[float, Ge(0)] = 1.0,
        queue_size: Annotated[int, Gt(0)] = 65536,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.999,
        temperature: Annotated[float, Gt(0)] = 0.2,
    ) -> None:
        super().__init__(backbone)
        hidden = [hidden_dim] if hidden_dim > 0 else []
        self.projector = build_mlp([backbone.embed_dim, *hidden, embed_dim], activation=nn.ReLU)
        self.contrast = MomentumContrast(
            self.backbone,
            self.projector,
            embed_dim=embed_dim,
            queue_size=queue_size,
            momentum=momentum,
            temperature=temperature,
        )
        # last, so that the student starts as under MoCo
        self.teacher = Teacher(
            teacher,
            hidden_dim=teacher_hidden_dim,
            embed_dim=embed_dim,
            weights=teacher_weights,
            sha256=teacher_sha256,
            batch_norm=teacher_bn,
            stem=teacher_stem,
        )
        self.distillation_weight = distillation_weight
        self.reduction = reduction
        self.contrast_weight = contrast_weight

    def pretrained(self) -> Mapping[str, str]:
        """Return the teacher's file."""
        return self.teacher.pretrained()

    def load_pretrained(self, say: Callable[[str], None] = print) -> None:
        """Load the teacher."""
        self.teacher.load(say)

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse a global batch that does not divide the queue."""
        if self.contrast_weight > 0:
            self.contrast.queue.check_batch(global_batch)

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say where the published sum weighs distillation otherwise than published."""
        batch = global_batch // num_ranks
        if self.reduction == "mean" or batch == PUBLISHED_BATCH:
            return ()
        return (
            f"reduction: published weighs distillation with the {batch} images of a rank; published with "
            f"{PUBLISHED_BATCH}; write `mean`, or {PUBLISHED_BATCH} images a rank",
        )

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the weighted loss against teacher and queue, then put this step's keys into the queue."""
        first, second = pair(views)
        queries, others = (self.projector(self.backbone(view)) for view in (first, second))
        taught = self.teacher(first)
        distillation = distillation_loss(queries, taught) + distillation_loss(others, self.teacher(second))
        weight = self.distillation_weight if self.reduction == "mean" else len(first)
        loss = weight * distillation
        metrics = {
            "distillation": distillation.detach(),
            "teacher_similarity": 1 - distillation.detach() / 4,  # the mean of both cosines
            "teacher_std": embedding_std(taught),
            "embedding_std": embedding_std(queries),
        }
        if self.contrast_weight > 0:
            contrast: StepOutput = self.contrast(queries, second)
            loss = loss + self.contrast_weight * contrast.loss
            metrics |= contrast.metrics
        return StepOutput(loss=loss, metrics=metrics)

    def after_step(self, progress: Progress) -> None:
        """Move the twin towards the student."""
        if self.contrast_weight > 0:
            self.contrast.follow((self.backbone, self.projector))
