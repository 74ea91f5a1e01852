"""Training written out in plain torch: what every engine is measured by."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrate.config.optim import LarsConfig, OptimConfig
from orchestrate.config.run import RunConfig
from orchestrate.engine.methods import build_method
from tests.engine.trials import progress_of, views_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def plain_training(
    config: RunConfig, steps: int, *, first_scale: float = 2.0**16
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Train with DistributedDataParallel at peak rates; return losses, parameters and buffers, and loss scales."""
    method = build_method(config)
    model = DistributedDataParallel(method)
    optimizer = torch_optimizer(config.optim, method, config.optim.lr_factor(config.train.global_batch))
    precision = config.train.precision
    scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, enabled=precision == "fp16")
    losses, scales = [], []
    for step in range(1, steps + 1):
        method.before_step(progress_of(step - 1))
        optimizer.zero_grad()
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
            loss = model(views_of(step), None).loss
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip(config.optim, [each for group in optimizer.param_groups for each in group["params"]])
        scaler.step(optimizer)
        scaler.update()
        method.after_step(progress_of(step))
        losses.append(float(loss.detach()))
    return losses, {name: value.detach().clone() for name, value in method.state_dict().items()}, scales


def clip(config: OptimConfig, parameters: list[nn.Parameter]) -> None:
    if config.clip == "global":
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    elif config.clip == "per_tensor":
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_(parameter, config.clip_norm)


def torch_optimizer(config: OptimConfig, module: nn.Module, factor: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weights = {"params": [each for each in trained if each.ndim > 1], "weight_decay": config.weight_decay}
    vectors: dict[str, Any] = {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0}
    lr = config.lr * factor
    if isinstance(config, LarsConfig):
        vectors["lr"] = config.bias_lr * factor
        return PlainLars([weights, vectors], {"lr": lr, "trust": config.trust, "triplet": config.variant == "triplet"})
    if config.name == "sgd":  # type: ignore[attr-defined]  # the sections are told apart by it
        return torch.optim.SGD([weights, vectors], lr=lr, momentum=0.9)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW  # type: ignore[attr-defined]
    return kind([weights, vectors], lr=lr, betas=(0.9, 0.999))


class PlainLars(torch.optim.Optimizer):
    """Both variants tensor by tensor, as the papers' text has them; momentum 0.9."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if weight.ndim > 1:
            decayed = gradient + group["weight_decay"] * weight
            below = gradient.norm() + group["weight_decay"] * weight.norm() if group["triplet"] else decayed.norm()
            gradient = decayed * (group["trust"] * weight.norm() / below)
        buffer = self.state[weight].setdefault("buffer", torch.zeros_like(weight))
        buffer.mul_(0.9).add_(gradient, alpha=group["lr"] if group["triplet"] else 1.0)
        weight.sub_(buffer, alpha=1.0 if group["triplet"] else group["lr"])
