"""Whether the network and the method of a config can be built and take its views; no memory or training needed."""

import copy
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from orchestrate.config.load import Problem
from orchestrate.config.run import METHODS, RunConfig
from ssl_methods import plugins

# What networks of others raise for sizes and options they cannot take.
_REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError, LookupError)
_LONGEST = 200


def construction_problems(config: RunConfig) -> list[Problem]:
    """Build what a worker would build, large networks on PyTorch's meta device, where tensors have shapes only.

    Networks that need numbers to be built pass unseen. Configs that share a network and a method are checked once.
    """
    from ssl_methods.views import recipe

    backbone, method = config.backbone, config.method
    views = recipe(config.views.name, config.views.size).views
    sides = tuple(sorted({max(1, round(config.views.size * view.size_factor)) for view in views}))
    if refusal := _backbone_refusal(backbone.name, backbone.stem, sides):
        key, reason = refusal
        return [Problem(("backbone", key), getattr(backbone, key), reason)]
    if problems := _recompute_problems(config):
        return problems
    if reason := _method_refusal(backbone.name, backbone.stem, method.name, json.dumps(method.params, sort_keys=True)):
        return [Problem(("method",), method.name, f"cannot be built on {backbone.name}: {reason}")]
    if problems := _sharding_problems(config):
        return problems
    if reason := _batch_refusal(config, num_views=len(views)):
        return [Problem(("method",), method.name, reason)]
    return []


def _recompute_problems(config: RunConfig) -> list[Problem]:
    """Refuse ways to save memory that would change the loss, or that find nothing to work on."""
    from ssl_methods.recompute import batch_coupling, residual_blocks

    network, system = config.backbone.name, config.system
    if system.micro_batch == "all" and not system.activation_checkpointing:
        return []
    problems = []
    backbone = _backbone(network, config.backbone.stem)
    norm = batch_coupling(backbone)
    if system.micro_batch != "all" and norm:
        reason = f"{network}: {norm} sees the whole batch, so micro-batches would change the loss"
        advice = "write `activation_checkpointing: true`, more ranks, or a backbone without batch norm"
        problems.append(Problem(("system", "micro_batch"), system.micro_batch, f"{reason}; {advice}"))
    if system.activation_checkpointing and not residual_blocks(backbone):
        reason = f"{network} has no stack of blocks to recompute; leave it out"
        problems.append(Problem(("system", "activation_checkpointing"), True, reason))
    return problems


@cache
def _backbone_refusal(name: str, stem: Any, sides: tuple[int, ...]) -> tuple[str, str] | None:
    """Return the key of the backbone's section that is wrong and why."""
    from ssl_methods.backbones import build

    # Our own networks are small, and random numbers on the meta device cost an import of a second.
    device = "cpu" if name in build.names() else "meta"
    if reason := _refusal(partial(_backbone, name, stem), device):
        return "name" if stem == "default" else "stem", reason
    for side in sides:
        if reason := _refusal(partial(_forward, name, stem, side), device):
            advice = "write another `views.size`, or another backbone"
            return "name", f"cannot take views of {side} pixels: {reason}; {advice}"
    return None


@cache
def _method_refusal(backbone: str, stem: Any, name: str, params: str) -> str:
    return _refusal(partial(_method, backbone, stem, name, params))


def _sharding_problems(config: RunConfig) -> list[Problem]:
    """Refuse parameters that ZeRO 3 would not gather: it watches the tensors that modules below the method return."""
    if config.system.zero_stage != 3:
        return []
    found: list[str] = []
    _refusal(lambda: found.append(own_parameter_problem(_method_of(config))))
    return [Problem(("system", "zero_stage"), 3, reason) for reason in found if reason]


def own_parameter_problem(method: Any) -> str:
    """Say why ZeRO 3 cannot train a method that holds a parameter itself; empty if it holds none."""
    own = [name for name, _ in method.named_parameters(recurse=False)]
    if not own:
        return ""
    reason = f"{own[0]} belongs to {type(method).__name__} itself, for which ZeRO 3 does not gather it"
    return f"{reason}; put it into a submodule, or write `zero_stage: 2`"


def _batch_refusal(config: RunConfig, *, num_views: int) -> str:
    batch = config.train.global_batch
    return _refusal(lambda: _method_of(config).check_batches(num_views=num_views, global_batch=batch))


def _method_of(config: RunConfig) -> Any:
    backbone, method = config.backbone, config.method
    return _method(backbone.name, backbone.stem, method.name, json.dumps(method.params, sort_keys=True))


@cache
def _method(backbone: str, stem: Any, name: str, params: str) -> Any:
    plugin: Any = plugins.load(METHODS, name)
    # A method may change its backbone, as by replacing batch norms.
    return plugin(copy.deepcopy(_backbone(backbone, stem)), **json.loads(params))


@cache
def _backbone(name: str, stem: Any) -> Any:
    from ssl_methods.backbones import build

    return build.build(name, stem=stem).train()


def _forward(name: str, stem: Any, side: int) -> None:
    import torch

    backbone = _backbone(name, stem)
    features = backbone(torch.empty(2, 3, side, side))
    if tuple(features.shape) != (2, backbone.embed_dim):
        raise ValueError(f"makes features of shape {tuple(features.shape)} of 2 images, not (2, {backbone.embed_dim})")


def _refusal(make: Callable[[], object], device: str = "meta") -> str:
    """Return why something cannot be made, in a line; empty if it can, or if only numbers would tell."""
    import torch

    try:
        with torch.device(device), torch.no_grad():
            make()
    except NotImplementedError:  # an operation without a meta kernel
        return ""
    except _REFUSALS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return "" if "meta tensor" in text else text[:_LONGEST]
    return ""
