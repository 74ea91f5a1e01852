"""Arithmetic of losses: fp32 at least, whatever the network runs in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_full_precision(loss: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a loss with autocast off and its half-precision tensors widened to fp32; float64 stays float64.

    A cross-correlation in bf16 resolves 2^-8 near 1, which is coarser than what a loss has to tell apart.
    """

    @wraps(loss)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        given = (*args, *kwargs.values())
        device = next(value.device.type for value in given if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            widened = {name: widen(value) for name, value in kwargs.items()}
            return loss(*map(widen, args), **widened)  # type: ignore[arg-type]  # same arguments, other dtype

    return wrapped


def widen(value: object) -> object:
    """Return half-precision tensors in fp32, everything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
