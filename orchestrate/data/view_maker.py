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
from orchestrate.data.processes import obey_parent, one_core_each
from orchestrate.errors import ConfigError
from ssl_methods.device_views import NUM_PARAMETERS, crop_views
from ssl_methods.views import ViewRecipe, make_views, view_sides

Pixels = Literal["fast", "reference", "device"]
_WANTED = "must return a uint8 array of shape (height, width, 1 or 3), not empty"


class Job(NamedTuple):
    """One row of a batch: the encoded image that goes there, and what its random numbers belong to."""

    row: int
    image: bytes
    epoch: int
    sample_id: int


class Transform(Protocol):
    """A user's own function on decoded images, before views are made.

    It gets and returns uint8 pixels of one channel or three, in any size and memory layout. `draw(n)` returns n uniform
    numbers that belong to this sample in this epoch.
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
        """The user's function. Raises ConfigError if it cannot be imported or called."""
        return load_transform(self.transform) if self.transform else None

    def make(self, jobs: Sequence[Job], rows: Rows) -> list[tuple[int, str]]:
        """Fill rows; return (row, reason) of the images that cannot be decoded, whose rows are undefined.

        Raises:
            ConfigError: the user's transform returned something that is no image.
        """
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
                image = checked_image(self.function(image, draw=self._draw(job)), self.transform)
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


def checked_image(pixels: object, path: str) -> UInt8[np.ndarray, "h w c"]:
    """Return what the transform `path` made, in memory that views can be made of.

    Raises:
        ConfigError: it is no uint8 array of one channel or three, or empty.
    """
    if not isinstance(pixels, np.ndarray):
        raise ConfigError(f"views.transform: {path}: returned {type(pixels).__name__}, {_WANTED}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise ConfigError(f"views.transform: {path}: returned {pixels.dtype} of shape {pixels.shape}, {_WANTED}")
    return np.ascontiguousarray(pixels) if min(pixels.strides) < 0 else pixels  # as of a mirrored view


def load_transform(path: str) -> Transform:
    """Import `module:function`. Raises ConfigError that says what is missing."""
    module, _, name = path.partition(":")
    try:
        function: Transform = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"views.transform: {path}: {error}; write `module:function`, importable on every node"
        ) from None
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise ConfigError(f"views.transform: {path}: is {kind}, must be a function")
    return function


# A pool hands plain data to its processes only through an initializer, and that only through a global.
_process: dict[str, Maker] = {}


def start_process(maker: Maker) -> None:
    """Make a process ready to run `make_in_process`."""
    obey_parent()
    one_core_each()
    _process["maker"] = maker


def make_in_process(jobs: Sequence[Job], rows: Rows) -> list[tuple[int, str]]:
    """Fill rows that lie in shared memory; see `Maker.make`."""
    return _process["maker"].make(jobs, rows)
