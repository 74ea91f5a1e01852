"""The state of a training, copied to where the next steps leave it alone."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrate.engine.layout import OptimizerState
from orchestrate.engine.ranks import Ranks

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold.

    Attributes:
        files: tensors on the CPU by file and name.
        settle: waits until every copy is whole; the GPU copies while the next step is prepared.
    """

    files: Mapping[str, Tensors]
    settle: Callable[[], None]


class SnapshotBuffers:
    """CPU memory that is filled by one snapshot after the other, as taking new memory costs more than copying."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[str, str], Tensor] = {}

    def copy(self, files: Mapping[str, Tensors]) -> Snapshot:
        """Copy tensors into the memory of the snapshot before, which must not be in use any more."""
        copies = {
            file: {name: self._copied(file, name, tensors[name]) for name in tensors} for file, tensors in files.items()
        }
        if self._device.type != "cuda":
            return Snapshot(copies, settle=_nothing)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))
        return Snapshot(copies, settle=copied.synchronize)

    def _copied(self, file: str, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get((file, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # Page-locked memory is what a GPU can fill by itself.
            pinned = self._device.type == "cuda"
            kept = self._kept[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return kept.copy_(tensor.detach(), non_blocking=True)


def _nothing() -> None:
    """Stand in for waiting where copies are whole at once."""


def find_non_finite(tensors: Tensors) -> str:
    """Name the first tensor that holds a NaN or an infinity; empty if all are finite."""
    floating = {name: value.detach() for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    # A tenth of the time of isfinite, which writes a mask: the extremes are finite only if everything is.
    extremes = [torch.stack(torch.aminmax(value)).double() for value in floating.values()]
    for device in {each.device for each in extremes}:
        there = [(name, each) for name, each in zip(floating, extremes, strict=True) if each.device == device]
        finite = torch.isfinite(torch.stack([each for _, each in there])).all(dim=1).tolist()
        for (name, _), good in zip(there, finite, strict=True):
            if not good:
                return name
    return ""


def flatten(state: OptimizerState) -> dict[str, Tensor]:
    """Give each tensor of an optimizer's state one name."""
    # JSON keys, because parameter names hold dots and state names may too.
    return {json.dumps([name, key]): value for name, values in state.items() for key, value in values.items()}


def unflatten(tensors: Tensors) -> OptimizerState:
    """Undo `flatten`."""
    state: OptimizerState = {}
    for label, value in tensors.items():
        name, key = json.loads(label)
        state.setdefault(name, {})[key] = value
    return state


def random_state(ranks: Ranks) -> dict[str, Tensor]:
    """Return the state of this rank's random-number generators."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def reseed(*numbers: int) -> None:
    """Begin the stream of random numbers that belongs to these numbers, and to no others."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))


def set_random_state(tensors: Tensors, ranks: Ranks) -> None:
    """Take up this rank's part of what `by_rank` joined."""
    torch.set_rng_state(tensors[f"{ranks.rank}.cpu"])
    if ranks.device.type == "cuda" and f"{ranks.rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{ranks.rank}.cuda"], ranks.device)


def by_rank(states: Sequence[Tensors]) -> dict[str, Tensor]:
    """Join the states of all ranks, in rank order, under names that begin with the rank."""
    return dict(_named_by_rank(states))


def _named_by_rank(states: Sequence[Tensors]) -> Iterator[tuple[str, Tensor]]:
    for rank, state in enumerate(states):
        for name, value in state.items():
            yield f"{rank}.{name}", value
