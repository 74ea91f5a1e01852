"""What the parts of the loader's benchmark share: options, rows, and passes that alternate between contestants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Kind = Literal["photos", "small"]
Measured = TypeVar("Measured")

KINDS: dict[Kind, tuple[str, int]] = {"photos": ("barlow_twins", 224), "small": ("small_grey", 28)}  # recipe, size
_SMALL_TIMES = 10  # so many small images for each photo: they are read that much faster


@dataclass(frozen=True)
class Options:
    """How much to measure; `seconds` are those of one contestant in one pass."""

    folder: Path
    samples: int
    seconds: float
    passes: int
    batch: int
    workers: int
    peers: str
    only: list[str]
    device: str

    def samples_of(self, kind: Kind) -> int:
        """Say how many images of a kind to make."""
        return self.samples * (_SMALL_TIMES if kind == "small" else 1)


@dataclass(frozen=True)
class Row:
    """One result; `ratio` is ours / peer, and `peer` is None where there is none to compare with."""

    name: str
    ours: float
    peer: float | None
    unit: str
    exact_ratio: float | None = None

    @property
    def ratio(self) -> float | None:
        """Divide ours by the peer's."""
        if self.exact_ratio is not None:
            return self.exact_ratio
        return self.ours / self.peer if self.peer else None


def alternate(contestants: Mapping[str, Callable[[], Measured]], passes: int) -> dict[str, list[Measured]]:
    """Measure each contestant once in every pass: what else the machine does then befalls all alike."""
    rounds = [{name: measure() for name, measure in contestants.items()} for _ in range(passes)]
    return {name: [each[name] for each in rounds] for name in contestants}


def compared(name: str, ours: list[float], peer: list[float], unit: str) -> Row:
    """Make a row of medians; the ratio is the median of the passes' ratios."""
    ratios = [mine / its for mine, its in zip(ours, peer, strict=True) if its]
    ratio = statistics.median(ratios) if ratios else None
    return Row(name, statistics.median(ours), statistics.median(peer), unit, ratio)


def cpu_ms(work: Callable[[int], object], seconds: float) -> float:
    """Return the CPU milliseconds of one call, all threads of this process together; calls count from 0."""
    work(0)
    calls, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds or not calls:
        work(calls)
        calls += 1
    return (time.process_time() - cpu_began) / calls * 1e3
