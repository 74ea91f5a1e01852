"""Probe: frozen features -> named numbers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Frozen features of a dataset, in sample order, on the CPU."""

    values: Float[Tensor, "samples dim"]
    labels: Int[Tensor, " samples"]


class Probe(ABC):
    """A protocol that scores features; fitted on `train`, scored on `val`, nothing is chosen on `val`."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Name the protocol with everything that changes its numbers, as in `knn_k20_cosine_t0.07`."""

    @abstractmethod
    def score(self, train: Features, val: Features) -> dict[str, float]:
        """Return named numbers, such as `top1` in 0..1."""
