"""Sections of the optimizers."""

import math
from typing import Literal

from orchestrate.config.budget import Budget
from orchestrate.config.fields import Fraction, NonNegative, Part, Positive, SameOrAmount
from orchestrate.config.section import Section


class OptimConfig(Section):
    """What every optimizer has.

    Attributes:
        lr: peak learning rate, for a global batch of 256 under `lr_scaling: linear`.
        weight_decay: of tensors with two axes or more; vectors are not decayed.
        final_weight_decay: where a cosine over the whole budget takes the weight decay.
        lr_scaling: what learning rates are multiplied by: global_batch / 256, its root, or 1.
        clip: bound the norm of all gradients together, or of each parameter's tensor.
        clip_norm: that bound.
        freeze_last_layer: how long the method's output layer is held still.
    """

    lr: Positive
    weight_decay: NonNegative = 0.0
    final_weight_decay: SameOrAmount = "same"
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    clip: Literal["none", "global", "per_tensor"] = "none"
    clip_norm: Positive = 1.0
    freeze_last_layer: Part = Budget(0, "ep")

    def lr_factor(self, global_batch: int) -> float:
        """Return what the learning rates of the config are multiplied by."""
        factors: dict[str, float] = {"linear": global_batch / 256, "sqrt": math.sqrt(global_batch / 256), "none": 1.0}
        return factors[self.lr_scaling]


class LarsConfig(OptimConfig):
    """LARS: `bias_lr` is for 1-D tensors, which have no decay and no trust ratio.

    The variants are those of the authors of Barlow Twins and of truncated triplet: they differ in the trust ratio and
    in whether the momentum buffer holds the learning rate.
    """

    name: Literal["lars"]
    bias_lr: Positive
    momentum: Fraction = 0.9
    trust: Positive = 0.001
    variant: Literal["barlow_twins", "triplet"] = "barlow_twins"


class SgdConfig(OptimConfig):
    """SGD with momentum; `decay_vectors` decays 1-D tensors too, as MoCo and DisCo do."""

    name: Literal["sgd"]
    momentum: Fraction = 0.9
    decay_vectors: bool = False


class AdamWConfig(OptimConfig):
    """AdamW; `decay_vectors` decays 1-D tensors too."""

    name: Literal["adamw"]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    decay_vectors: bool = False


class AdamConfig(OptimConfig):
    """Adam, whose weight decay is a part of the gradient and so scaled with it; `decay_vectors` decays 1-D tensors too.

    Source: Kingma and Ba 2014, arXiv:1412.6980; Loshchilov and Hutter 2017, arXiv:1711.05101, on how AdamW differs.
    """

    name: Literal["adam"]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    decay_vectors: bool = False


Optimizer = LarsConfig | SgdConfig | AdamWConfig | AdamConfig
OPTIMIZERS: dict[str, type[Optimizer]] = {
    "lars": LarsConfig,
    "sgd": SgdConfig,
    "adamw": AdamWConfig,
    "adam": AdamConfig,
}
