"""Twins: slow averages of a network that is trained."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

SomeModule = TypeVar("SomeModule", bound=nn.Module)


def build_twin(online: SomeModule) -> SomeModule:
    """Copy a network as the start of its own moving average: equal weights and buffers, no gradient.

    A twin never drops units or blocks, also while it is in training mode for the sake of its batch norms.
    """
    twin = copy.deepcopy(online).requires_grad_(False)
    part: Any
    for part in twin.modules():
        kind = type(part).__name__  # torchvision's and timm's are known by name, to spare their imports
        if isinstance(part, _DropoutNd) or kind == "StochasticDepth":
            part.p = 0.0
        elif kind == "DropPath":
            part.drop_prob = 0.0
    return twin


@torch.no_grad()
def update_twin(twin: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """Move the twin's parameters towards the online network's: twin <- momentum twin + (1 - momentum) online.

    Buffers stay: the running moments of a twin's batch norms follow from its own forward passes.
    """
    torch._foreach_lerp_(list(twin.parameters()), list(online.parameters()), 1.0 - momentum)
