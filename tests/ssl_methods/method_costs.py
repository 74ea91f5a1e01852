"""What a step of a method costs for an image, counted on tensors that have shapes only."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_methods import plugins
from ssl_methods.backbone import Backbone, TokenBackbone
from ssl_methods.backbones import build
from ssl_methods.method import Method, Progress
from ssl_methods.teacher import Teacher
from ssl_methods.views import recipe

PACKAGE = "ssl_methods.methods"
SIDE = 224
SMALL_SIDE, SMALL_BATCH = 56, 32  # as good for counting views: small crops have whole sides in all recipes
BATCH = 256  # a matrix of all pairs of images costs the more, the larger the batch
STEPS = 16  # over which sizes that are drawn anew at each step are averaged
# What a method cannot be built without, and the mode in which all of it works.
_KNOBS: dict[str, Any] = {"teacher_weights": "random", "num_classes": 1000}


@dataclass(frozen=True)
class Pass:
    """Forward passes of the trained backbone that keep what the backward pass needs.

    Attributes:
        views: an image.
        area: pixels of such a view, as a share of 224 x 224.
    """

    views: float
    area: float


@cache
def count_passes(name: str) -> tuple[Pass, ...]:
    """Count the views of an image that go through the trained backbone with gradient, by size."""
    backbone = build.build("tiny_resnet")  # which pixels it sees is up to the method
    method = _on_meta(name, backbone)
    steps = [_sizes(method, backbone, step) for step in range(2)]
    if steps[0] == steps[1]:
        return tuple(Pass(views, area) for area, views in sorted(steps[0].items(), reverse=True))
    steps += [_sizes(method, backbone, step) for step in range(2, STEPS)]
    views = sum(sum(each.values()) for each in steps) / STEPS
    pixels = sum(area * views for each in steps for area, views in each.items()) / STEPS
    return (Pass(views, pixels / views),)


def count_flops(name: str, *, network: str = "resnet50") -> float:
    """Count the operations of forward and backward pass of all networks and the loss, an image; optimizer not counted.

    A multiplication with its addition is two.
    """
    backbone = build.build(network)
    method = _on_meta(name, backbone)
    drawn = _sizes(method, backbone, 0) != _sizes(method, backbone, 1)
    steps = STEPS if drawn else 1
    with FlopCounterMode(display=False) as counter:
        for step in range(steps):
            _step(method, step, side=SIDE, batch=BATCH).backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() / BATCH / steps


def _on_meta(name: str, backbone: Backbone) -> Method:
    chosen: Any = plugins.load(PACKAGE, name)
    known = inspect.signature(chosen).parameters
    with torch.device("meta"):
        method: Method = chosen(backbone.to("meta"), **{key: value for key, value in _KNOBS.items() if key in known})
    for module in method.modules():
        if isinstance(module, Teacher):
            module._seen_loaded = True  # a tensor without numbers cannot say so
    return method


def _sizes(method: Method, backbone: Backbone, step: int) -> dict[float, float]:
    """Return how many views of an image pass with gradient in a step, by their area."""
    seen: dict[float, float] = {}

    def note(images: Tensor) -> None:
        if torch.is_grad_enabled():
            area = images.shape[-1] * images.shape[-2] / SMALL_SIDE**2
            seen[area] = seen.get(area, 0.0) + len(images) / SMALL_BATCH

    # Methods that want tokens call `encode`, which `forward` of such a network calls too.
    entrance = "encode" if isinstance(backbone, TokenBackbone) else "forward"
    original = getattr(backbone, entrance)

    def noted(images: Tensor) -> Any:
        note(images)
        return original(images)

    with patch.object(backbone, entrance, noted):
        _step(method, step, side=SMALL_SIDE, batch=SMALL_BATCH)
    return seen


def _step(method: Method, step: int, *, side: int, batch: int) -> Tensor:
    sides = [max(1, round(side * view.size_factor)) for view in recipe(method.default_views, side).views]
    with torch.device("meta"):
        views = [torch.empty(batch, 3, each, each) for each in sides]
        labels = torch.zeros(batch, dtype=torch.int64) if method.uses_labels else None
    method.before_step(Progress(step, 10**6, 1000.0))
    with patch("torch.autocast", lambda *args, **options: nullcontext()):  # which knows no meta device
        loss: Tensor = method(views, labels).loss
    return loss
