"""Bitwise repeatable arithmetic: the same step on the same machine gives the same bits."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_NO_KERNEL = re.compile(r"(\w+) does not have a deterministic implementation")


def make_deterministic(device: torch.device, *, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let this process use only kernels that give the same bits each time; call it before the first matrix product.

    An operation without such a kernel raises RuntimeError when it runs (see `op_without_kernel`); a warning would let a
    training go on whose promise is broken, and would leave attention's backward pass with its faster, unordered sums.
    On the CPU none of our networks, methods and losses has one. On CUDA these have none in their backward pass:
    adaptive pooling to more than 1x1 (VGG, AlexNet), `interpolate` other than nearest, `grid_sample`, reflection
    padding.

    Over ranks, sums also depend on the number of ranks; on CUDA, on the collective library's choice of algorithm.
    """
    # Not use_deterministic_algorithms, which imports the compiler to set the flag below: 2 s of every start.
    torch.set_deterministic_debug_mode("error")
    environment["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if compiler := sys.modules.get("torch._inductor.config"):
        compiler.deterministic = True  # type: ignore[attr-defined]  # it has read its environment already
    # Filling fresh memory would only change what reads memory that nothing wrote, and costs a write of every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        # cuBLAS splits sums by the workspace it finds; it looks once, when the first product makes its handle.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def op_without_kernel(error: BaseException) -> str:
    """Name the operation that raised because it has no repeatable kernel; empty if that was not the reason."""
    found = _NO_KERNEL.search(str(error)) if isinstance(error, RuntimeError) else None
    return found.group(1) if found else ""
