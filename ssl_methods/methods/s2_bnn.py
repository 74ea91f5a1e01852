"""S2-BNN: a binary network learns from a real one, and from contrast if wanted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.backbones.build import Stem
from ssl_methods.binary import binarise_weights, is_binary, make_weights_positive
from ssl_methods.heads import build_mlp
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.guided import guided_loss
from ssl_methods.method import Method, Progress, StepOutput, pair
from ssl_methods.momentum_contrast import MomentumContrast
from ssl_methods.sign_flips import SignFlips
from ssl_methods.teacher import Teacher

PUBLISHED_RANK_BATCH = 32


class S2BNN(Method):
    """Train a binary network to distribute its embedding over its coordinates as a real, frozen teacher does.

    Both see the same view. A contrastive term against the keys of earlier images may be added, or stand alone.
    Distillation alone uses the first view only: a recipe of one view saves the work for the second. Backbones without
    binary convolutions are trained as they are.

    Args:
        backbone: network to train; `reactnet_a` in the paper.
        mode: "distillation" (the paper's best), "contrastive" (MoCo, no teacher), or the sum of both terms.
        progressive: train in two stages, as published: binary activations with real weights, then binary weights. The
            latent weights then start uniformly between 0 and 0.001, as published. Without it all is binary at once
            and they start uniformly between -0.001 and 0.001, as positive ones would all have one sign.
        embed_dim: width of the embedding, equal to the teacher's; for distillation it is the number of classes.
        hidden_dim: width of the projector's hidden layer (authors: the width of the backbone).
        distillation_temperature: divides student's and teacher's unit embeddings (tau).
        queue_size: number of negatives (K); the global batch divides it.
        momentum: share of itself that the twin, which makes the keys, keeps in a step (m).
        temperature: divides the cosine similarities of the contrastive term.
        teacher: backbone of the teacher.
        teacher_stem: of that backbone; "small" for images of about 32 px.
        teacher_weights: path or URL of its weights and its head's, or "random" for an untrained control.
        teacher_sha256: of that file; empty for no check.
        teacher_hidden_dim: width of the hidden layer of the teacher's head; 0: the teacher has no head.
        teacher_bn: whether the teacher's batch norms use their own moments or those of a rank's part of the batch.

    Differs:
        - Distillation alone leaves twin and queue as they were made; the authors' code makes keys that nothing uses.
        - Without `progressive` the latent weights start with both signs; the authors' code has positive ones always.
        - The blocks of `reactnet_a` own no convolution that nothing uses.
        - A teacher whose weights are missing is an error; the authors' code warns and trains against random weights.
        - The twin moves after the optimizer's step instead of before the next, which is the same.

    Source: Shen et al. 2021, arXiv:2102.08946; Liu et al. 2020, arXiv:2003.03488 (the network).
    """

    equation: ClassVar[str] = (
        "L = -mean_i sum_c p_ic log q_ic [+ InfoNCE]; p_i = softmax(t_i / tau), q_i = softmax(z_i / tau), "
        "t_i and z_i of unit length"
    )
    default_views: ClassVar[str] = "s2_bnn"
    num_views: ClassVar[int] = 0
    rank_bound: ClassVar[tuple[str, ...]] = ("batch norm sees one rank's part of the batch",)
    has_twin: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        mode: Literal["distillation", "contrastive", "contrastive_distillation"] = "distillation",
        progressive: bool = True,
        embed_dim: Annotated[int, Gt(0)] = 128,
        hidden_dim: Annotated[int, Gt(0)] = 1024,
        distillation_temperature: Annotated[float, Gt(0)] = 0.2,
        queue_size: Annotated[int, Gt(0)] = 65536,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.999,
        temperature: Annotated[float, Gt(0)] = 0.2,
        teacher: str = "resnet50",
        teacher_stem: Stem = "default",
        teacher_weights: str = "",
        teacher_sha256: str = "",
        teacher_hidden_dim: Annotated[int, Ge(0)] = 2048,
        teacher_bn: Literal["eval", "train"] = "eval",
    ) -> None:
        super().__init__(backbone)
        self.mode, self.progressive = mode, progressive
        self.distillation_temperature = distillation_temperature
        if progressive:
            make_weights_positive(backbone)
        self.projector = build_mlp([backbone.embed_dim, hidden_dim, embed_dim], activation=nn.ReLU)
        self.contrast = MomentumContrast(
            self.backbone,
            self.projector,
            embed_dim=embed_dim,
            queue_size=queue_size,
            momentum=momentum,
            temperature=temperature,
        )
        self.sign_flips = SignFlips() if is_binary(backbone) else None
        self.teacher = None
        if mode != "contrastive":
            self.teacher = Teacher(
                teacher,
                hidden_dim=teacher_hidden_dim,
                embed_dim=embed_dim,
                weights=teacher_weights,
                sha256=teacher_sha256,
                batch_norm=teacher_bn,
                stem=teacher_stem,
            )
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))

    @property
    def num_stages(self) -> int:
        """Two if weights become binary on the way."""
        return 2 if self.progressive and self.sign_flips is not None else 1

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse what the contrastive term cannot take: other than two views, a batch that its queue does not fit."""
        if self.mode == "distillation":
            return
        if num_views != 2:
            raise ValueError(f"views: mode {self.mode} takes 2, the recipe makes {num_views}")
        self.contrast.queue.check_batch(global_batch)

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say what the paper had otherwise."""
        found = []
        if self.sign_flips is None:
            found.append("the backbone has no binary convolution, so a real network is trained, in one stage")
        rank_batch = global_batch // num_ranks
        if not PUBLISHED_RANK_BATCH / 4 <= rank_batch <= PUBLISHED_RANK_BATCH * 4:
            found.append(
                f"batch norm sees {rank_batch} images on each of {num_ranks} ranks; published with "
                f"{PUBLISHED_RANK_BATCH}, 256 on 8 ranks"
            )
        return tuple(found)

    def pretrained(self) -> Mapping[str, str]:
        """Return the teacher's file."""
        return {} if self.teacher is None else self.teacher.pretrained()

    def load_pretrained(self, say: Callable[[str], None] = print) -> None:
        """Load the teacher's weights."""
        if self.teacher is not None:
            self.teacher.load(say)

    def before_step(self, progress: Progress) -> None:
        """Choose between real and binary weights, in the twin as well."""
        binary = progress.stage > 0 or not self.progressive
        for network in (self.backbone, self.contrast.backbone):
            binarise_weights(network, binary)

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the sum of the mode's terms; the contrastive one puts this step's keys into the queue."""
        embeddings = self.projector(self.backbone(views[0]))
        terms = []
        if self.mode != "distillation":
            terms.append(self.contrast(embeddings, pair(views)[1]))
        if self.teacher is not None:
            terms.append(self._guide(embeddings, self.teacher(views[0])))
        metrics = {name: value for term in terms for name, value in term.metrics.items()}
        if self.sign_flips is not None:
            self.sign_flips.remember(self.backbone)
            metrics |= self.sign_flips.metrics()
        loss = torch.stack([term.loss for term in terms]).sum()
        return StepOutput(loss=loss, metrics={**metrics, "embedding_std": embedding_std(embeddings)})

    def after_step(self, progress: Progress) -> None:
        """Move the twin towards the student if it makes keys, and count the signs that changed."""
        if self.mode != "distillation":
            self.contrast.follow((self.backbone, self.projector))
        if self.sign_flips is not None:
            self.sign_flips.compare(self.backbone)

    def _guide(self, student: Tensor, teacher: Tensor) -> StepOutput:
        terms = guided_loss(student, teacher, temperature=self.distillation_temperature)
        return StepOutput(
            loss=terms.loss,
            metrics={"guided": terms.loss.detach(), "kl": terms.divergence, "teacher_entropy": terms.entropy},
        )
