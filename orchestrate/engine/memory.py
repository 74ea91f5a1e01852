"""How much memory a rank has needed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIGABYTE = 1e9


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in 10^9 bytes.

    On CUDA it is what tensors held on the device; the allocator's reserve, the CUDA context and NCCL's buffers come on
    top. On the CPU it is the resident set of this process, without the loader's workers.
    """
    if device.type == "cuda":
        from torch.cuda import max_memory_allocated

        return max_memory_allocated(device) / GIGABYTE
    return _peak_resident_bytes() / GIGABYTE


def _peak_resident_bytes() -> int:
    # getrusage counts what the process that forked this one held before exec, so the kernel's own mark comes first.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
