"""Colour jitter and grey of one view in one pass: torchvision's arithmetic on float images, rounded once at the end.

The pass is C (`_pixels.c`), called so that other threads of Python run meanwhile. Where it was not built, numpy does
the same float32 operations in the same order: slower, equal to the bit.
"""

from __future__ import annotations

import ctypes
import struct
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

Planes = Float32[np.ndarray, "3 pixels"]


class Step(IntEnum):
    """One operation of the jitter; the numbers are those of `_pixels.c`."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


Steps = Sequence[tuple[Step, float]]


def recolour(
    view: UInt8[np.ndarray, "height width channels"], steps: Steps, *, grey: bool = False
) -> UInt8[np.ndarray, "height width _"]:
    """Apply the steps in order, then drop the colours if `grey`.

    Args:
        view: one channel (grey) or three, contiguous.
        steps: operations with their amounts: factors of brightness (0 is black), contrast (0 is the mean grey level)
            and saturation (0 is grey), and the turn of the hue, -0.5 to 0.5 of the colour circle. Contrast at most
            once.
        grey: drop the colours (ITU-R 601-2 luma).

    Returns:
        A new array, of one channel if `grey` or if `view` has one. One channel gives what three equal ones give.
    """
    return (recolour_in_c if c_is_built() else recolour_in_numpy)(view, steps, grey=grey)


def c_is_built() -> bool:
    """Tell whether the C routine is there; where it is not, a warning says so once."""
    return _library() is not None


def recolour_in_c(
    view: UInt8[np.ndarray, "height width channels"],
    steps: Steps,
    *,
    grey: bool = False,
    widest_vector_bits: int = 512,
) -> UInt8[np.ndarray, "height width _"]:
    """Do what `recolour` does in C, with vectors of 128, 256 or 512 bits at most; all give equal results."""
    library = _library()
    assert library is not None, "c_is_built() tells"
    height, width, channels = view.shape
    if view.dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"view: {view.dtype} of shape {view.shape}, must be uint8 with 1 or 3 channels"
        )  # C reads bytes
    target = np.empty((height, width, 1 if grey else channels), np.uint8)
    count = len(steps)
    packed = struct.pack(f"{count}i{count}f", *[kind for kind, _ in steps], *[amount for _, amount in steps])
    source = np.ascontiguousarray(view)
    library.recolour(
        _address(source), _address(target), height * width, channels, grey, packed, count, widest_vector_bits
    )
    return target


def recolour_in_numpy(
    view: UInt8[np.ndarray, "height width channels"], steps: Steps, *, grey: bool = False
) -> UInt8[np.ndarray, "height width _"]:
    """Do what `recolour` does without C."""
    height, width, channels = view.shape
    planes = np.broadcast_to(view.reshape(-1, channels).T, (3, height * width)).astype(np.float32)
    for step, amount in steps:
        planes = _OPERATIONS[step](planes, np.float32(amount))
    if grey:
        planes = _luma(planes)[None]
    rounded = (planes + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(rounded[: 1 if grey else channels].T).reshape(height, width, -1)


def _address(array: UInt8[np.ndarray, "_ _ _"]) -> int:
    # `array.ctypes.data` takes longer than the colours of a 28 px view.
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _library() -> ctypes.CDLL | None:
    """Load the C routine that setuptools has put beside this file; warn once where there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_pixels{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
            library.recolour.argtypes = [pointer, pointer, long, integer, integer, ctypes.c_char_p, integer, integer]
            library.recolour.restype = None
            return library
    warnings.warn(
        "views: the C routine for colours was not built when this package was installed; numpy does the same, several "
        "times slower. Install a C compiler (gcc) and install the package again.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _brighten(planes: Planes, factor: np.float32) -> Planes:
    return _clamp(factor * planes)


def _contrast(planes: Planes, factor: np.float32) -> Planes:
    # The sum is of integers (4096ths of a level), so that its order does not matter.
    sum_of_grey = int((_luma(planes) * np.float32(4096) + np.float32(0.5)).astype(np.int32).sum(dtype=np.int64))
    mean = np.float32(sum_of_grey / (4096 * planes.shape[1]))
    return _clamp(factor * planes + (np.float32(1) - factor) * mean)


def _saturate(planes: Planes, factor: np.float32) -> Planes:
    return _clamp(factor * planes + (np.float32(1) - factor) * _luma(planes))


def _turn_hue(planes: Planes, turn: np.float32) -> Planes:
    """Turn the hue, a place on a circle of six: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5."""
    red, green, blue = planes
    high, low = planes.max(axis=0), planes.min(axis=0)
    chroma = high - low
    redmost, greenmost = high == red, high == green
    side = np.where(redmost, green - blue, np.where(greenmost, blue - red, red - green))
    offset = np.where(redmost, np.float32(0), np.where(greenmost, np.float32(2), np.float32(4)))
    hue = side / np.where(chroma > 0, chroma, np.float32(1)) + offset + np.float32(6) * turn
    hue = np.where(hue < 0, hue + np.float32(6), hue)
    hue = np.where(hue >= 6, hue - np.float32(6), hue)
    weights = (np.abs(hue - np.float32(3)) - 1, 2 - np.abs(hue - np.float32(2)), 2 - np.abs(hue - np.float32(4)))
    return np.stack([low + chroma * weight.clip(0, 1) for weight in weights])


def _luma(planes: Planes) -> Float32[np.ndarray, " pixels"]:
    red, green, blue = planes
    luma: Float32[np.ndarray, " _"] = np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    return luma


def _clamp(planes: Planes) -> Planes:
    clamped: Planes = planes.clip(0, 255)
    return clamped


_OPERATIONS: dict[Step, Callable[[Planes, np.float32], Planes]] = {
    Step.BRIGHTNESS: _brighten,
    Step.CONTRAST: _contrast,
    Step.SATURATION: _saturate,
    Step.HUE: _turn_hue,
}
