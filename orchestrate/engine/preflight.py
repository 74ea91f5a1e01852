"""Look whether every node is fit to run, before an attempt spends hours on it.

each rank                its GPU answers, and holds nothing of anybody else
the first of each node   nobody of an earlier attempt is left; disks take files; the datasets can be reached
all ranks agree          a node that alone cannot do what others can is unfit; what nobody can do is no node's fault
all ranks together       a product and a sum of which the result is known
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.engine.faults import exit_code_of, in_a_line
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.records import node_name
from orchestrate.engine.strangers import find_strangers, gpu_users
from orchestrate.errors import DataError, OrchestrateError, PreflightError, StorageError
from orchestrate.exits import Exit
from orchestrate.runs import RunDir

MIN_FREE_BYTES = 256 * 2**20
# A context of CUDA, which every process has that ever touched the GPU, takes up to 1 GB.
MAX_FOREIGN_GPU_BYTES = 2 * 2**30
# Processes that were told to end need a moment to do so; a superseded worker sees it with its next heartbeat.
_STRANGER_PATIENCE_SECONDS = 10.0
_PRODUCT_SIZE = 512


@dataclass(frozen=True)
class Report:
    """What one rank found.

    Attributes:
        node: where.
        check: that failed; empty if none did.
        problem: in words.
        shared: whether the fault may lie in what all nodes share, if all of them have it.
        device: which GPU the rank has, by its serial number; empty without one.
        data_error: why the datasets cannot be used from here; empty if they can.
    """

    node: str
    check: str = ""
    problem: str = ""
    shared: bool = False
    device: str = ""
    data_error: str = ""


def check_nodes(ranks: Ranks, job: RunDir, *, load_data: Callable[[], int]) -> int:
    """Check all nodes; every rank must call it.

    Args:
        ranks: of the attempt.
        job: folder into which it will write.
        load_data: reads what the datasets say of themselves.

    Returns:
        What `load_data` returned.

    Raises:
        PreflightError: a node is not fit; on every rank.
        DataError: the datasets cannot be used from any node.
        OrchestrateError: no node can write into the RunDir.
    """
    found, data_error = 0, None
    try:
        found = load_data()
    except DataError as error:
        data_error = error
    report = check_node(ranks, job, data_error="" if data_error is None else str(data_error))
    if isinstance(data_error, StorageError):  # a store that is silent is no node's fault, and asking again may help
        raise data_error
    reports = _gather(ranks, report)
    blame(reports, report, data_error)
    _compute(ranks, report.node)
    return found


def check_node(ranks: Ranks, job: RunDir, *, data_error: str) -> Report:
    """Look at this rank's GPU and, on the first rank of a node, at the node itself."""
    node, device = node_name(), _device_id(ranks.device)
    problems = [_gpu_problem(ranks.device)] if ranks.device.type == "cuda" else []
    if ranks.local_rank == 0:
        problems += [_stranger_problem(), _disk_problem("temporary folder", tempfile.gettempdir())]
    first = next((each for each in problems if each), None)
    if first is not None:
        return Report(node, *first, device=device, data_error=data_error)
    if ranks.local_rank == 0 and (full := _disk_problem("RunDir", str(job.path))):
        return Report(node, *full, shared=True, device=device, data_error=data_error)
    return Report(node, device=device, data_error=data_error)


def blame(reports: Sequence[Report], own: Report, data_error: DataError | None) -> None:
    """Decide from all reports whether the attempt may begin.

    Raises:
        PreflightError, DataError, OrchestrateError: see `check_nodes`.
    """
    unfit = {each.node: each for each in reports if each.check}
    nodes = {each.node for each in reports}
    if unfit and set(unfit) == nodes and all(each.shared for each in unfit.values()):
        raise OrchestrateError(f"{own.problem or next(iter(unfit.values())).problem}; free space and resume")
    without_data = {each.node: each.data_error for each in reports if each.data_error}
    if data_error is not None and set(without_data) == nodes:
        raise data_error
    for node, problem in without_data.items():
        unfit.setdefault(node, Report(node, "dataset", f"{problem}, which other nodes can read"))
    for node in _nodes_with_shared_gpus(reports):
        unfit.setdefault(node, Report(node, "GPUs", "two ranks have the same GPU; ask for one a rank"))
    if unfit:
        told = "; ".join(f"node {node}: {each.problem}" for node, each in sorted(unfit.items()))
        raise PreflightError(told, check=unfit[own.node].check if own.node in unfit else "")


def _nodes_with_shared_gpus(reports: Sequence[Report]) -> list[str]:
    devices = [(each.node, each.device) for each in reports if each.device]
    return sorted({node for node, device in devices if devices.count((node, device)) > 1})


def _gather(ranks: Ranks, report: Report) -> list[Report]:
    if ranks.world_size == 1:
        return [report]
    reports: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(reports, report, group=ranks.patient_group)
    return reports


def _device_id(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def _gpu_problem(device: torch.device) -> tuple[str, str] | None:
    """Say whether a GPU is in use by others; a person who shares the GPU of a workstation is only told."""
    free, total = torch.cuda.mem_get_info(device)
    if total - free <= MAX_FOREIGN_GPU_BYTES:
        return None
    problem = f"{(total - free) / 2**30:.1f} GiB of GPU {device.index} are in use{gpu_users(_device_id(device))}"
    if "ORCHESTRATE_JOB" not in os.environ:
        print(f"preflight: {problem}", flush=True)
        return None
    return "GPU memory", problem


def _stranger_problem() -> tuple[str, str] | None:
    ends = time.monotonic() + _STRANGER_PATIENCE_SECONDS
    while found := find_strangers():
        if time.monotonic() >= ends:
            return "processes", f"{'; '.join(found)}; it should have ended"
        time.sleep(0.2)
    return None


def _disk_problem(what: str, folder: str) -> tuple[str, str] | None:
    """Say whether a folder takes no file, or few."""
    path = Path(folder) / f".preflight-{node_name()}-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        disk = os.statvfs(folder)
    except OSError as error:
        return "disk", f"{what} {folder} cannot be written: {error.strerror}"
    finally:
        _remove(path)
    free = disk.f_bavail * disk.f_frsize
    if free >= MIN_FREE_BYTES:
        return None
    return "disk", f"{what} {folder} has {free / 2**20:.0f} MiB left, {MIN_FREE_BYTES / 2**20:.0f} are the least"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _compute(ranks: Ranks, node: str) -> None:
    """Multiply and sum what has a known result.

    Raises:
        PreflightError: a result is wrong, or this rank's device or network cannot compute it.
    """
    try:
        rows = small_product(ranks.device)
        summed = rows + ranks.rank
        if ranks.world_size > 1:
            dist.all_reduce(summed)
        rows, summed = rows.cpu(), summed.cpu()
    except Exception as error:
        if isinstance(error, RuntimeError) and exit_code_of(error) != Exit.PEER_LOST:
            raise PreflightError(f"node {node}: {in_a_line(error)}", check="computation") from error
        raise
    expected = known_product()
    if not torch.equal(rows, expected):
        raise PreflightError(f"node {node}: a product of matrices is wrong", check="computation")
    others = ranks.world_size * (ranks.world_size - 1) // 2
    if not torch.equal(summed, expected * ranks.world_size + others):
        raise PreflightError(f"node {node}: a sum over all ranks is wrong", check="collective")


def small_product(device: torch.device) -> Tensor:
    """Return the sums of the rows of a product of two matrices, all of whose numbers are small and whole."""
    matrix = _matrix().to(device, torch.float32)
    return (matrix @ matrix).sum(1, dtype=torch.float64)


def known_product() -> Tensor:
    """Return what `small_product` must return, by another way."""
    matrix = _matrix().to(torch.float64)
    return matrix @ matrix.sum(1)


def _matrix() -> Tensor:
    return (torch.arange(_PRODUCT_SIZE**2) % 7).reshape(_PRODUCT_SIZE, _PRODUCT_SIZE)
