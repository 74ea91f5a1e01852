"""Run a function on several gloo ranks of this machine and collect what each returned."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# What the ranks of some test import; optimizers and DistributedDataParallel import torch._dynamo.
PRELOADED = ["tests.distributed", "torch", "torch._dynamo", "torchvision", "deepspeed"]


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes joined in a gloo group; return the results in rank order.

    `function` must be importable (defined at the top of a module) and its results must pickle. An exception on any
    rank is raised here with that rank's traceback. The ranks run on one thread each, and find their number with
    `torch.distributed.get_rank()`.
    """
    # forked from a server that has imported all that is slow: 0.1 s a rank instead of 5 s
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _run_rank, args=(world_size, folder, function, args), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), _result(folder, rank))
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
