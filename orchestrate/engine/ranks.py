"""Who this process is among the ranks of a trial, and the few collectives the engine itself needs."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.engine.records import node_name
from orchestrate.engine.tensor_file import as_bytes
from orchestrate.errors import OrchestrateError, PreflightError

COLLECTIVE_TIMEOUT_MINUTES = 30
PATIENCE_HOURS = 24

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among `world_size` ranks, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    patient_group: Any = None  # gloo, for waits that may be long; None if the default group will do

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the RunDir's shared files."""
        return self.rank == 0

    def mean(self, values: list[Tensor]) -> list[float]:
        """Average scalars over the ranks in one collective; float64, so that sums of flags stay exact."""
        vector = torch.stack([value.detach().to(self.device, torch.float64) for value in values])
        if self.world_size > 1:
            dist.all_reduce(vector)
        return [float(value) for value in (vector / self.world_size).tolist()]

    def any(self, flag: bool) -> bool:
        """Return whether any rank raised the flag."""
        return self.mean([torch.tensor(float(flag))])[0] > 0

    def wait_for_main(self) -> None:
        """Wait until rank 0 comes here too, for hours if it must: it may be fitting a probe."""
        if self.world_size > 1:
            dist.broadcast_object_list([None], src=0, group=self.patient_group)

    def gather_to_main(self, value: Any) -> list[Any]:
        """Return the value of every rank, in rank order, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.patient_group)
        return values or []

    def on_main(self, work: Callable[[], ResultT]) -> ResultT:
        """Do something on rank 0, for hours if it must, and return its result on every rank.

        Raises:
            OrchestrateError: whatever `work` raised of this kind, on every rank.
        """
        box: list[Any] = [_attempt(work) if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.patient_group)
        if isinstance(box[0], OrchestrateError):
            raise box[0]
        result: ResultT = box[0]
        return result

    def fill_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, which have the same shapes."""
        for tensor in tensors if self.world_size > 1 else ():
            sent = tensor.detach().to(self.device).contiguous()
            if sent.numel():
                dist.broadcast(as_bytes(sent), src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def tensors_from_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return CPU tensors of rank 0 on every rank; what the others pass does not matter."""
        layout = self.on_main(lambda: [(name, value.shape, value.dtype) for name, value in tensors.items()])
        mine = tensors if self.is_main else {name: torch.empty(shape, dtype=kind) for name, shape, kind in layout}
        self.fill_from_main(mine.values())
        return dict(mine)


def _attempt(work: Callable[[], ResultT]) -> ResultT | OrchestrateError:
    try:
        return work()
    except OrchestrateError as error:
        return error


def join_ranks(environment: Mapping[str, str] = os.environ, *, patience_minutes: float = 0.0) -> Ranks:
    """Join the process group that the launcher's environment describes.

    Collectives give up after half an hour, or a little after `patience_minutes`, so that a hang watch comes first.

    RANK, WORLD_SIZE and LOCAL_RANK place the process (0, 1, 0 if absent); ORCHESTRATE_RENDEZVOUS is the URL where the
    ranks meet (`env://` if absent); ORCHESTRATE_DEVICE is `cpu` (gloo) or `cuda` (nccl), found out if absent.
    """
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", 0))
    kind = environment.get("ORCHESTRATE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    device = local_gpu(local_rank, environment) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    rendezvous = environment.get("ORCHESTRATE_RENDEZVOUS", "env://")
    timeout = timedelta(minutes=max(COLLECTIVE_TIMEOUT_MINUTES, patience_minutes + 5))
    backend = "nccl" if kind == "cuda" else "gloo"
    if world_size == 1 and "MASTER_ADDR" not in environment and rendezvous == "env://":
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif rendezvous.startswith("file://"):
        # Not through a URL, in which `#` and `?` of a path would mean something.
        path = rendezvous.removeprefix("file://")
        files = dist.FileStore(path, world_size)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=files, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=PATIENCE_HOURS)) if world_size > 1 else None
    return Ranks(rank, world_size, local_rank, device, patient)


def local_gpu(local_rank: int, environment: Mapping[str, str]) -> torch.device:
    """Return the GPU of a rank: that of its number, or the only one where the launcher shows each rank its own.

    Raises:
        PreflightError: there are too few.
    """
    visible = torch.cuda.device_count()
    ranks = int(environment.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if visible >= ranks or visible == 1:  # that two ranks share it is found out later
        return torch.device("cuda", local_rank if visible >= ranks else 0)
    shown = environment.get("CUDA_VISIBLE_DEVICES", "not set")
    problem = f"{visible} GPUs are visible, {ranks} ranks need one each (CUDA_VISIBLE_DEVICES: {shown})"
    raise PreflightError(f"node {node_name()}: {problem}", check="GPUs")


def leave_ranks() -> None:
    """Leave the process group at the end of good work; after an error it might wait for ranks that will never come."""
    if dist.is_initialized():
        dist.destroy_process_group()
