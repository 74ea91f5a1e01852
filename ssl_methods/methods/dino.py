"""DINO: self-distillation without labels, from a slow teacher's large crops to all crops of a student."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.heads import DinoHead
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.dino import dino_loss, updated_centre
from ssl_methods.method import Method, Progress, StepOutput
from ssl_methods.multi_crop import NUM_LARGE, batches_by_size, by_view, check_large_views
from ssl_methods.self_distillation import TeacherSchedule


class Dino(Method):
    """Train a student, crop by crop, to give the class distribution that its slow twin gives to another, large crop.

    The first two views are the large ones; the teacher sees these only, the student all. Views of one size that
    follow each other go through the student as one batch. The teacher is what is evaluated.

    Args:
        backbone: network to train.
        embed_dim: width of the head's bottleneck.
        hidden_dim: width of the head's two hidden layers.
        output_dim: number of classes of the distributions (K).
        momentum: share of itself that the teacher keeps in the first step (lambda); it grows to 1 along a cosine. The
            paper has 0.996 for a global batch of 1024; smaller batches want more.
        student_temperature: divides the student's logits (tau_s).
        teacher_temperature: divides the teacher's centred logits (tau_t), once warmed up.
        initial_teacher_temperature: what that temperature starts from; it grows on a straight line.
        temperature_warmup_epochs: epochs until it has grown. Per step here, once an epoch in the authors' code.
        centre_momentum: share of itself that the centre keeps in a step (m).

    The last layer's gain is fixed at 1 (the authors' `norm_last_layer`), which is the stabler choice.

    Differs:
        - The teacher's temperature grows with every step; once an epoch in the authors' code.
        - Crops may have any number of sizes; two in the authors' code.

    Source: Caron et al. 2021, arXiv:2104.14294; values of its 300-epoch multi-crop recipe.
    """

    equation: ClassVar[str] = (
        "L = mean over pairs of different crops of -sum_k t_k log s_k, "
        "t = softmax((teacher - c) / tau_t), s = softmax(student / tau_s)  (eq. 2-4)"
    )
    default_views: ClassVar[str] = "dino"
    num_views: ClassVar[int] = 0
    has_twin: ClassVar[bool] = True
    has_last_layer: ClassVar[bool] = True

    centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 256,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        output_dim: Annotated[int, Gt(1)] = 65536,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.996,
        student_temperature: Annotated[float, Gt(0)] = 0.1,
        teacher_temperature: Annotated[float, Gt(0)] = 0.07,
        initial_teacher_temperature: Annotated[float, Gt(0)] = 0.04,
        temperature_warmup_epochs: Annotated[float, Ge(0)] = 30.0,
        centre_momentum: Annotated[float, Ge(0), Le(1)] = 0.9,
    ) -> None:
        super().__init__(backbone)
        self.head = DinoHead(backbone.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=embed_dim, output_dim=output_dim)
        self.teacher_backbone = build_twin(self.backbone)
        self.teacher_head = build_twin(self.head)
        self.register_buffer("centre", torch.zeros(output_dim))
        self.student_temperature = student_temperature
        self.schedule = TeacherSchedule(
            momentum, teacher_temperature, initial_teacher_temperature, temperature_warmup_epochs
        )
        self.centre_momentum = centre_momentum
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))
        synchronise_batch_norm(self)

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse recipes without two large views."""
        check_large_views(num_views)

    def before_step(self, progress: Progress) -> None:
        """Set the teacher's temperature and momentum."""
        self.teacher_temperature = self.schedule.temperature_at(progress)
        self.momentum = self.schedule.momentum_at(progress)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the loss under the centre of the steps before, then move the centre."""
        check_large_views(len(views))
        teacher = self._teach(views[:NUM_LARGE])
        embeddings = self.head.mlp(torch.cat([self.backbone(batch) for batch in batches_by_size(views)]))
        terms = dino_loss(
            by_view(self.head.compare(embeddings), len(views)),
            teacher,
            centre=self.centre,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        self.centre.copy_(updated_centre(self.centre, teacher, momentum=self.centre_momentum))
        return StepOutput(
            loss=terms.loss,
            metrics={
                "dino": terms.loss.detach(),
                "teacher_entropy": terms.entropy,
                "teacher_imbalance": terms.imbalance,
                "embedding_std": embedding_std(embeddings[: len(views[0])]),
            },
        )

    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student."""
        update_twin(self.teacher_backbone, self.backbone, momentum=self.momentum)
        update_twin(self.teacher_head, self.head, momentum=self.momentum)

    def last_layer(self) -> tuple[nn.Parameter, ...]:
        """Return the student's learnt directions; the authors hold them still for the first epoch."""
        return (self.head.last_layer.weight,)

    def encoder(self) -> Backbone:
        """Return the teacher's backbone."""
        return self.teacher_backbone

    @torch.no_grad()
    def _teach(self, views: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.teacher_head(self.teacher_backbone(torch.cat(list(views))))
        return by_view(logits, len(views))
