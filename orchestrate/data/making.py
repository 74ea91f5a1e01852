"""Views of samples, written into the rows of a batch: in this thread, or in a process that shares the memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from orchestrate.data.images import DECODE_ERRORS, decode
from orchestrate.errors import ConfigError
from ssl_methods.device_views import NUM_PARAMETERS, crop_views
from ssl_methods.views import ViewRecipe, make_views, view_sides

Pixels = Literal["fast", "reference", "device"]


class Job(NamedTuple):
    """One row of a batch: the encoded image that goes there, and what its random numbers belong to."""

    row: int
    image: bytes
    epoch: int
    sample_id: int


class Transform(Protocol):
    """A user's own function on decoded images, before views are made.

    `draw(n)` returns n uniform numbers that belong to this sample in this epoch.
    """

    def __call__(
        self, pixels: UInt8[np.ndarray, "_ _ _"], *, draw: Callable[[int], list[float]]
    ) -> UInt8[np.ndarray, "_ _ _"]:
        """Return the pixels to make views of."""


@dataclass(frozen=True)
class Rows:
    """Memory of a batch: for each view a tensor of pixels, and in device mode one of the parameters left to apply."""

    views: list[UInt8[Tensor, "batch _ _ 3"]]
    parameters: list[Float32[Tensor, "batch _"]]

    @staticmethod
    def allocate(maker: Maker, num_rows: int, *, pinned: bool = False, shared: bool = False) -> Rows:
        """Allocate a batch. torch keeps pinned memory and gives it out again when copies from it are done."""
        views = [torch.empty((num_rows, side, side, 3), dtype=torch.uint8, pin_memory=pinned) for side in maker.sides]
        parameters = [torch.zeros((num_rows, NUM_PARAMETERS), pin_memory=pinned) for _ in maker.sides]
        rows = Rows(views, parameters if maker.pixels == "device" else [])
        if shared:
            for tensor in (*rows.views, *rows.parameters):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        return rows


@dataclass(frozen=True)
class Maker:
    """Make views; plain data, so that it can go to another process.

    Attributes:
        recipe: the views.
        seed: of the augmentation.
        pixels: `fast`, `reference` (torchvision), or `device`: crops only, the rest is left to `finish_views`.
        transform: `module:function` of the user (see `Transform`), or empty.
    """

    recipe: ViewRecipe
    seed: int
    pixels: Pixels = "fast"
    transform: str = ""

    @property
    def sides(self) -> tuple[int, ...]:
        """Pixels of each view."""
        return view_sides(self.recipe)

    @cached_property
    def function(self) -> Transform | None:
        """The user's function. Raises ConfigError if it cannot be imported."""
        return load_transform(self.transform) if self.transform else None

    def make(self, jobs: Sequence[Job], rows: Rows) -> list[tuple[int, str]]:
        """Fill rows; return (row, reason) of the images that cannot be decoded, whose rows are undefined."""
        views = [view.numpy() for view in rows.views]
        parameters = [each.numpy() for each in rows.parameters]
        failures = []
        for job in jobs:
            try:
                image = decode(job.image)
            except DECODE_ERRORS as error:
                failures.append((job.row, f"cannot be decoded: {error}"))
                continue
            if self.function is not None:
                image = self.function(image, draw=self._draw(job))
            where: dict[str, Any] = {"seed": self.seed, "epoch": job.epoch, "sample_id": job.sample_id}
            out = [view[job.row] for view in views]
            if self.pixels == "device":
                for row, (_, drawn) in zip(parameters, crop_views(image, self.recipe, **where, out=out), strict=True):
                    row[job.row] = drawn
            else:
                make_views(image, self.recipe, **where, pixels=self.pixels, out=out)
        return failures

    def _draw(self, job: Job) -> Callable[[int], list[float]]:
        from ssl_methods.randomness import uniforms

        return lambda count: uniforms(self.seed, epoch=job.epoch, sample_id=job.sample_id, view=-1, count=count)


def load_transform(path: str) -> Transform:
    """Import `module:function`. Raises ConfigError that says what is missing."""
    module, _, name = path.partition(":")
    try:
        function: Transform = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"views.transform: {path}: {error}; write `module:function`, importable on every node"
        ) from None
    return function


# A pool hands plain data to its processes only through an initializer, and that only through a global.
_process: dict[str, Maker] = {}


def start_process(maker: Maker) -> None:
    """Make a process ready to run `make_in_process`."""
    from orchestrate.data.processes import obey_parent

    obey_parent()
    torch.set_num_threads(1)
    _process["maker"] = maker


def make_in_process(jobs: Sequence[Job], rows: Rows) -> list[tuple[int, str]]:
    """Fill rows that lie in shared memory; see `Maker.make`."""
    return _process["maker"].make(jobs, rows)
