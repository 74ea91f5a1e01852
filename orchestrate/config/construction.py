"""Whether the network and the method of a config can be built and take its views; no memory or training needed."""

import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
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
    if refusal := _backbone_refusal(backbone.name, backbone.stem, backbone.window, sides):
        key, reason = refusal
        return [Problem(("backbone", key), getattr(backbone, key), reason)]
    if problems := _recompute_problems(config):
        return problems
    network = (backbone.name, backbone.stem, backbone.window)
    if reason := _method_refusal(*network, method.name, json.dumps(method.params, sort_keys=True)):
        return [Problem(("method",), method.name, f"cannot be built on {backbone.name}: {reason}")]
    if problems := [*_sharding_problems(config), *_stage_problems(config)]:
        return problems
    if reason := batch_refusal(config, num_ranks=1):
        return [Problem(("method",), method.name, reason)]
    return _pretrained_problems(config)


def batch_refusal(config: RunConfig, *, num_ranks: int) -> str:
    """Say why the method of a config cannot take its batches on so many ranks; empty if it can."""
    sizes: dict[str, int] = {"global_batch": config.train.global_batch, "num_ranks": num_ranks}
    return _refusal(lambda: _method_of(config).check_batches(num_views=_num_views(config), **sizes))


def batch_advice(config: RunConfig, *, num_ranks: int) -> tuple[str, ...]:
    """Return what the method of a config says of its batches on so many ranks; nothing if it cannot be built here."""
    said: list[str] = []
    sizes: dict[str, int] = {"global_batch": config.train.global_batch, "num_ranks": num_ranks}
    _refusal(lambda: said.extend(_method_of(config).advice(**sizes)))
    return tuple(said)


def _pretrained_problems(config: RunConfig) -> list[Problem]:
    """Refuse weights to begin with that are on this machine by their name, and are not there."""
    named: dict[str, str] = {}
    _refusal(lambda: named.update(_method_of(config).pretrained()))
    fix = "write the path or URL of a file of weights; paths are from the folder of the command"
    return [
        Problem(("method", knob), path, f"no such file; {fix}" if path else fix)
        for knob, path in named.items()
        if not path or not _is_somewhere(path)
    ]


def _is_somewhere(path: str) -> bool:
    """Tell whether a file is here, or at a place that is not looked at."""
    return ("://" in path and not path.startswith("file://")) or Path(path.removeprefix("file://")).is_file()


def _num_views(config: RunConfig) -> int:
    from ssl_methods.views import recipe

    return len(recipe(config.views.name, config.views.size).views)


def _recompute_problems(config: RunConfig) -> list[Problem]:
    """Refuse ways to save memory that would change the loss, or that find nothing to work on."""
    from ssl_methods.recompute import batch_coupling, residual_blocks

    network, system = config.backbone.name, config.system
    if system.micro_batch == "all" and not system.activation_checkpointing:
        return []
    problems = []
    backbone = _backbone(network, config.backbone.stem, config.backbone.window)
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
def _backbone_refusal(name: str, stem: Any, window: int, sides: tuple[int, ...]) -> tuple[str, str] | None:
    """Return the key of the backbone's section that is wrong and why."""
    from ssl_methods.backbones import build

    # Our own networks are small, and random numbers on the meta device cost an import of a second.
    device = "cpu" if name in build.names() else "meta"
    if reason := _refusal(partial(_backbone, name, stem, window), device):
        return "window" if window and "window" in reason else "stem" if stem != "default" else "name", reason
    for side in sides:
        if reason := _refusal(partial(_forward, name, stem, window, side), device):
            advice = "write another `views.size`, or another backbone"
            return "name", f"cannot take views of {side} pixels: {reason}; {advice}"
    return None


@cache
def _method_refusal(backbone: str, stem: Any, window: int, name: str, params: str) -> str:
    return _refusal(partial(_method, backbone, stem, window, name, params))


def _sharding_problems(config: RunConfig) -> list[Problem]:
    """Refuse parameters that ZeRO 3 would not gather: it watches the tensors that modules below the method return."""
    if config.system.zero_stage != 3:
        return []
    found: list[str] = []
    _refusal(lambda: found.append(own_parameter_problem(_method_of(config))))
    return [Problem(("system", "zero_stage"), 3, reason) for reason in found if reason]


def _stage_problems(config: RunConfig) -> list[Problem]:
    """Refuse another number of stages than the method's training has."""
    found: list[int] = []
    _refusal(lambda: found.append(_method_of(config).num_stages))
    starts = config.train.stages.starts
    wanted = [each - 1 for each in found if each - 1 != len(starts)]
    if not wanted:
        return []
    fix = f"write {wanted[0]} in all, as in `starts: [50%]`" if wanted[0] else "leave `train.stages` out"
    stages = "1 stage" if found[0] == 1 else f"{found[0]} stages, of which the first begins by itself"
    reason = f"{config.method.name} trains in {stages}; {fix}"
    return [Problem(("train", "stages", "starts"), ", ".join(map(str, starts)) or "none", reason)]


def own_parameter_problem(method: Any) -> str:
    """Say why ZeRO 3 cannot train a method that holds a parameter itself; empty if it holds none."""
    own = [name for name, _ in method.named_parameters(recurse=False)]
    if not own:
        return ""
    reason = f"{own[0]} belongs to {type(method).__name__} itself, for which ZeRO 3 does not gather it"
    return f"{reason}; put it into a submodule, or write `zero_stage: 2`"


def _method_of(config: RunConfig) -> Any:
    backbone, method = config.backbone, config.method
    network = (backbone.name, backbone.stem, backbone.window)
    return _method(*network, method.name, json.dumps(method.params, sort_keys=True))


@cache
def _method(backbone: str, stem: Any, window: int, name: str, params: str) -> Any:
    plugin: Any = plugins.load(METHODS, name)
    # A method may change its backbone, as by replacing batch norms.
    return plugin(copy.deepcopy(_backbone(backbone, stem, window)), **json.loads(params))


@cache
def _backbone(name: str, stem: Any, window: int) -> Any:
    from ssl_methods.backbones import build

    return build.build(name, stem=stem, window=window).train()


def _forward(name: str, stem: Any, window: int, side: int) -> None:
    import torch

    backbone = _backbone(name, stem, window)
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
