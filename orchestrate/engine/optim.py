"""Optimizers, their parameter groups, and what schedules set in them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrate.config.optim import AdamConfig, AdamWConfig, LarsConfig, OptimConfig, SgdConfig


class Lars(Optimizer):
    """The elementwise part of layer-wise adaptive rate scaling: momentum.

    Trust ratios and weight decay need the norms of whole layers; `GradientRules` has put them into the gradients
    already. So this step is right on any slices of the parameters.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of the sum of updates.
        lr_in_buffer: sum lr * u, so that a change of the learning rate acts with the lag of the momentum (variant
            triplet), or u alone (variant barlow_twins).

    Source: You et al. 2017, arXiv:1708.03888; Zbontar et al. 2021, arXiv:2103.03230; Wang et al. 2021,
        arXiv:2104.08760.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, lr_in_buffer: bool) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "lr_in_buffer": lr_in_buffer})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            moving = {parameter: parameter.grad for parameter in group["params"] if parameter.grad is not None}
            if moving:
                self._update(list(moving), list(moving.values()), group)
        return None

    def _update(self, parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        into_buffer, into_weight = (group["lr"], 1.0) if group["lr_in_buffer"] else (1.0, group["lr"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=into_buffer)
        torch._foreach_add_(parameters, buffers, alpha=-into_weight)


def parameter_groups(
    config: OptimConfig, module: nn.Module, last_layer: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups that share their schedules; none is empty.

    A group's keys: `peak_lr` (before the scaling with the batch), `weight_decay`, `decays` (whether the weight decay
    of the config is for it), `adapt` (whether LARS scales its tensors), `last_layer`, and `still` (whether it is held
    still at this step).
    """
    last = {id(parameter) for parameter in last_layer}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    vector_lr = config.bias_lr if isinstance(config, LarsConfig) else config.lr
    decay_vectors = not isinstance(config, LarsConfig) and getattr(config, "decay_vectors", False)
    groups = []
    for is_last in (False, True):
        for is_vector in (False, True):
            members = [p for p in trainable if (id(p) in last) == is_last and (p.ndim <= 1) == is_vector]
            decays = decay_vectors or not is_vector
            group = {
                "params": members,
                "peak_lr": vector_lr if is_vector else config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
                "decays": decays,
                "adapt": not is_vector,
                "last_layer": is_last,
                "still": False,
            }
            groups += [group] if members else []
    return groups


def build_optimizer(
    config: OptimConfig, module: nn.Module, *, global_batch: int, last_layer: Sequence[nn.Parameter] = ()
) -> Optimizer:
    """Build the optimizer of a config; each group carries its `peak_lr`, the learning rate that schedules scale."""
    groups = parameter_groups(config, module, last_layer)
    factor = config.lr_factor(global_batch)
    for group in groups:
        group["peak_lr"] *= factor
        group["lr"] = group["peak_lr"]
    if isinstance(config, LarsConfig):
        return Lars(groups, lr=0.0, momentum=config.momentum, lr_in_buffer=config.variant == "triplet")
    if isinstance(config, SgdConfig):
        return torch.optim.SGD(groups, momentum=config.momentum)
    assert isinstance(config, (AdamWConfig, AdamConfig))
    kind = torch.optim.AdamW if isinstance(config, AdamWConfig) else torch.optim.Adam
    return kind(groups, betas=(config.beta1, config.beta2))


def set_rates(optimizer: Any, *, lr_factor: float, weight_decay: float, frozen: bool) -> float:
    """Set what schedules say for the next step.

    While `frozen`, the groups of the last layer have learning rate 0. What the optimizer remembers of that time is
    dropped at the first step after it, so that the layer begins as if it had had no gradient until then.

    Args:
        optimizer: with the groups of `build_optimizer`.
        lr_factor: of every group's peak learning rate.
        weight_decay: of the groups that decay.
        frozen: whether the last layer is held still.

    Returns:
        The first group's learning rate.
    """
    for group in optimizer.param_groups:
        still = frozen and group["last_layer"]
        if group["still"] and not still:
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
        group["still"] = still
        group["lr"] = 0.0 if still else group["peak_lr"] * lr_factor
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return float(optimizer.param_groups[0]["lr"])
