"""EsViT: self-distillation of whole crops and of their regions, for transformers of several stages."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone, Encoded, TokenBackbone
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.ema import build_twin, update_twin
from ssl_methods.heads import DinoHead
from ssl_methods.indicators import embedding_std
from ssl_methods.losses.dino import dino_loss, updated_centre
from ssl_methods.losses.region import RegionLoss, region_loss
from ssl_methods.method import Method, Progress, StepOutput
from ssl_methods.multi_crop import NUM_LARGE, batches_by_size, by_view, check_large_views
from ssl_methods.self_distillation import TeacherSchedule

PUBLISHED_BATCH = 512
Region = Literal["always", "never", "last_stage"]


class EsViT(Method):
    """Train a student to give a slow twin's class distribution of another crop, as a whole and region by region.

    The first two views are the large ones; the teacher sees these only, the student all. Each region of a student's
    crop is matched with the region of the teacher's crop whose features are the likest. The teacher is what is
    evaluated.

    With `region: last_stage` the training has two stages: whole crops alone, then both; `train.stages` says when. The
    region head has no gradient in the first stage, and what an optimizer then still does to it (ZeRO 1 and 2 decay
    it) is undone after each step by copying the teacher's region head, which has not moved. Let the optimizer begin
    anew there (`train.stages.optimizer: reset`): if it is kept, Adam under ZeRO 1 and 2 counts the first stage's
    steps as the region head's too, and starts it with larger steps than other engines do.

    Args:
        backbone: network to train; it gives features of regions, unless `region` is never.
        embed_dim: width of the bottleneck of each head.
        hidden_dim: width of the two hidden layers of each head.
        output_dim: number of classes of the distributions (K).
        region: whether regions are compared in all stages, in none, or in the last of two.
        view_weight: of the loss of whole crops, in steps that compare regions too; in the others it is 1.
        region_weight: of the loss of regions.
        norm_last_layer: hold the lengths of the classes' directions at 1, which is the stabler choice; else they are
            learnt.
        momentum: share of itself that the teacher keeps in the first step (lambda); it grows to 1 along a cosine.
        student_temperature: divides the student's logits (tau_s).
        teacher_temperature: divides the teacher's centred logits (tau_t), once warmed up.
        initial_teacher_temperature: what that temperature starts from; it grows on a straight line.
        temperature_warmup_epochs: epochs until it has grown.
        centre_momentum: share of itself that each of the two centres keeps in a step.

    Differs:
        - The teacher's temperature grows with every step; once an epoch in the authors' code.
        - Crops may have any number of sizes; two in the authors' code.
        - What the optimizer keeps is dropped at the second stage if `train.stages` says so; there a failed load drops
          it, silently.
        - Stochastic depth is the backbone's own: 0.1 at the end of timm's Swin transformers, 0.2 of torchvision's
          swin_t; the authors have 0.1 in Swin-T and 0.2 in larger ones.

    Source: Li et al. 2022, arXiv:2106.09785; values of the authors' 300-epoch recipe for Swin-T.
    """

    equation: ClassVar[str] = (
        "L = w_V mean_(t,s) -P_t log p_s + w_R mean_(t,s) mean_i -P'_t[j(i)] log p'_s[i],"
        " j(i) = argmax_j cos(z_s[i], z_t[j])  (eq. 1-3)"
    )
    default_views: ClassVar[str] = "esvit"
    num_views: ClassVar[int] = 0
    has_twin: ClassVar[bool] = True
    has_last_layer: ClassVar[bool] = True

    centre: Tensor
    region_centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        embed_dim: Annotated[int, Gt(0)] = 256,
        hidden_dim: Annotated[int, Gt(0)] = 2048,
        output_dim: Annotated[int, Gt(1)] = 65536,
        region: Literal["always", "never", "last_stage"] = "always",
        view_weight: Annotated[float, Ge(0)] = 0.5,
        region_weight: Annotated[float, Ge(0)] = 0.5,
        norm_last_layer: bool = False,
        momentum: Annotated[float, Ge(0), Le(1)] = 0.996,
        student_temperature: Annotated[float, Gt(0)] = 0.1,
        teacher_temperature: Annotated[float, Gt(0)] = 0.07,
        initial_teacher_temperature: Annotated[float, Gt(0)] = 0.04,
        temperature_warmup_epochs: Annotated[float, Ge(0)] = 30.0,
        centre_momentum: Annotated[float, Ge(0), Le(1)] = 0.9,
    ) -> None:
        super().__init__(backbone)
        if region != "never" and not isinstance(backbone, TokenBackbone):
            fix = "write `region: never`, or take a ResNet, a Swin or plain vision transformer, or one of ours"
            raise ValueError(f"region: {region}: the backbone gives no features of regions; {fix}")
        shape: dict[str, Any] = {"hidden_dim": hidden_dim, "bottleneck_dim": embed_dim, "output_dim": output_dim}
        self.heads = nn.ModuleDict(
            {
                part: DinoHead(backbone.embed_dim, learn_gain=not norm_last_layer, **shape)
                for part in ("view", "region")[: 1 if region == "never" else 2]
            }
        )
        self.teacher_backbone = build_twin(self.backbone)
        self.teacher_heads = build_twin(self.heads)
        self.register_buffer("centre", torch.zeros(output_dim))
        if region != "never":
            self.register_buffer("region_centre", torch.zeros(output_dim))
        self.region: Region = region
        self.view_weight, self.region_weight = view_weight, region_weight
        self.student_temperature, self.centre_momentum = student_temperature, centre_momentum
        self.schedule = TeacherSchedule(
            momentum, teacher_temperature, initial_teacher_temperature, temperature_warmup_epochs
        )
        self.before_step(Progress(step=0, total_steps=1, steps_per_epoch=1.0))
        synchronise_batch_norm(self)

    @property
    def num_stages(self) -> int:
        """Return 2 if regions wait for the last stage."""
        return 2 if self.region == "last_stage" else 1

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse recipes without two large views."""
        check_large_views(num_views)

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Warn of a small batch with the published momentum."""
        if 4 * global_batch > PUBLISHED_BATCH or self.schedule.momentum > 0.996:
            return ()
        line = f"global_batch {global_batch}: published with {PUBLISHED_BATCH}; a smaller one wants momentum nearer 1"
        return (f"{line}, as 0.9995 for 64",)

    def before_step(self, progress: Progress) -> None:
        """Set the teacher's temperature and momentum, and whether regions are compared."""
        self.teacher_temperature = self.schedule.temperature_at(progress)
        self.momentum = self.schedule.momentum_at(progress)
        self.compares_regions = self.region != "never" and progress.stage == self.num_stages - 1

    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the loss under the centres of the steps before, then move these."""
        check_large_views(len(views))
        with torch.no_grad():
            (large,) = self._encode(self.teacher_backbone, views[:NUM_LARGE])
            teacher = by_view(self.teacher_heads["view"](large.features), NUM_LARGE)
        encoded = self._encode(self.backbone, views)
        head: Any = self.heads["view"]
        embeddings = head.mlp(torch.cat([each.features for each in encoded]))
        terms = dino_loss(
            by_view(head.compare(embeddings), len(views)),
            teacher,
            centre=self.centre,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        self.centre.copy_(updated_centre(self.centre, teacher, momentum=self.centre_momentum))
        loss, metrics = terms.loss, {"view": terms.loss.detach()}
        metrics |= {"teacher_entropy": terms.entropy, "teacher_imbalance": terms.imbalance}
        if self.compares_regions:
            regions = self._compare_regions(encoded, large, batch=len(views[0]))
            loss = self.view_weight * terms.loss + self.region_weight * regions.loss
            metrics |= {"region": regions.loss.detach(), "region_entropy": regions.entropy}
            metrics |= {"region_imbalance": regions.imbalance, "distinct_matches": regions.distinct}
        return StepOutput(loss, {**metrics, "embedding_std": embedding_std(embeddings[: len(views[0])])})

    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student; hold a region head still that has no gradient yet."""
        update_twin(self.teacher_backbone, self.backbone, momentum=self.momentum)
        for part in self.heads:
            if part == "region" and not self.compares_regions:
                update_twin(self.heads[part], self.teacher_heads[part], momentum=0.0)
            else:
                update_twin(self.teacher_heads[part], self.heads[part], momentum=self.momentum)

    def last_layer(self) -> tuple[nn.Parameter, ...]:
        """Return the directions of the student's heads, and their lengths; the authors freeze them for an epoch."""
        heads: Any = self.heads.values()
        return tuple(parameter for head in heads for parameter in head.last_layer.parameters())

    def encoder(self) -> Backbone:
        """Return the teacher's backbone."""
        return self.teacher_backbone

    def _encode(self, network: Any, views: Sequence[Tensor]) -> list[Encoded]:
        """Return features and, if they are asked for, tokens, of views of one size at a time."""
        batches = batches_by_size(views)
        if self.compares_regions:
            return [network.encode(batch) for batch in batches]
        features = (network(batch) for batch in batches)
        return [Encoded(each, each[:, None]) for each in features]

    def _compare_regions(self, encoded: Sequence[Encoded], large: Encoded, *, batch: int) -> RegionLoss:
        with torch.no_grad():
            logits = self.teacher_heads["region"](large.tokens.flatten(0, 1))
            teacher = logits.unflatten(0, (NUM_LARGE, batch, -1))
        terms = region_loss(
            self.heads["region"](torch.cat([each.tokens.flatten(0, 1) for each in encoded])),
            teacher,
            student_features=[view for each in encoded for view in torch.split(each.tokens.detach(), batch)],
            teacher_features=torch.unflatten(large.tokens, 0, (NUM_LARGE, batch)),
            centre=self.region_centre,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        # as the rows of one crop: these may be of any number
        rows = logits[None]
        self.region_centre.copy_(updated_centre(self.region_centre, rows, momentum=self.centre_momentum))
        return terms
