"""Optimizers and their parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrate.config.run import AdamWConfig, LarsConfig, SgdConfig

OptimConfig = LarsConfig | SgdConfig | AdamWConfig


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling, as Barlow Twins uses it.

    A group with `adapt` decays its tensors and scales each update by trust * |w| / |g + decay * w| (1 if either norm
    is 0); the others take a plain momentum step. The momentum buffer holds no learning rate.

    Source: You et al. 2017, arXiv:1708.03888; the variant of Zbontar et al. 2021, arXiv:2103.03230.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if group["adapt"]:
            update = update + group["weight_decay"] * parameter
            weight_norm, update_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            both = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(
                both, group["trust"] * weight_norm / update_norm, torch.ones_like(weight_norm)
            )
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(update)
        parameter.add_(buffer, alpha=-group["lr"])


def parameter_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters into tensors that decay (2-D and more) and vectors that do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]


def build_optimizer(config: OptimConfig, module: nn.Module, *, global_batch: int) -> Optimizer:
    """Build the optimizer of a config; each group carries its `peak_lr`, the learning rate that schedules scale."""
    factor = config.lr_factor(global_batch)
    weights, vectors = parameter_groups(module)
    vector_lr = config.bias_lr if isinstance(config, LarsConfig) else config.lr
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": config.weight_decay, "peak_lr": config.lr * factor, "adapt": True},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": vector_lr * factor, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    if isinstance(config, LarsConfig):
        return Lars(groups, lr=config.lr * factor, momentum=config.momentum, trust=config.trust)
    if isinstance(config, SgdConfig):
        return torch.optim.SGD(groups, lr=config.lr * factor, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr * factor, betas=(config.beta1, config.beta2))


def set_learning_rates(optimizer: Any, factor: float) -> float:
    """Scale every group's peak learning rate; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
