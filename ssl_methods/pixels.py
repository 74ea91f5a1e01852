"""Pixel operations of views on uint8 arrays of one channel (grey) or three: exact, and as fast as libraries make them.

Resizing is torch's antialiased one (Pillow's filters), blurring is OpenCV's true Gaussian; colours are in `colour`.
All of them let other threads run meanwhile.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.functional import interpolate

Interpolation = Literal["bicubic", "bilinear"]
Box = tuple[int, int, int, int]


def resize(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int], interpolation: Interpolation
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resize with antialiasing, as Pillow's filters of the same name do but for rounding (0.03 levels in the mean).

    Left and right come first, then up and down; the other way round where Pillow 13 does it so: both round to uint8 in
    between. Earlier versions of Pillow never do, and differ by 0.2 levels in the mean on such crops.

    Args:
        image: any strides that are not negative: a crop need not be copied before.
        size: new height and width, pixels.
        interpolation: "bicubic" or "bilinear".
    """
    # Channels-last memory takes torch two thirds of the time of planes. Numpy moves axes quicker, which shows on tiny
    # images.
    batch = torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    (height, width, _), (new_height, new_width) = image.shape, size
    # The rule of Pillow's Resample.c; torch skips the axis that does not change.
    if height - new_height > 2 * max(0, width - new_width) and width != new_width:
        batch = interpolate(batch, (new_height, width), mode=interpolation, antialias=True)
    resized = interpolate(batch, size, mode=interpolation, antialias=True)
    pixels: UInt8[np.ndarray, "_ _ _"] = resized.numpy().transpose(0, 2, 3, 1)[0]
    return pixels


def flip(view: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "height width channels"]:
    """Mirror left and right."""
    return _with_channels(cv2.flip(view, 1))


def blur_reach(sigma: float) -> int:
    """Return how far a pixel is blurred: four standard deviations hold all but 0.01 % of a Gaussian."""
    return int(4 * sigma + 0.5)


def blur(view: UInt8[np.ndarray, "height width channels"], sigma: float) -> UInt8[np.ndarray, "height width channels"]:
    """Blur with a Gaussian of standard deviation `sigma` pixels; edges are mirrored."""
    # OpenCV's GaussianBlur rounds the kernel to 1/256 to be the same everywhere: several times the error, and slower.
    kernel = cv2.getGaussianKernel(2 * blur_reach(sigma) + 1, sigma, cv2.CV_32F)
    return _with_channels(cv2.sepFilter2D(view, -1, kernel, kernel))


def solarise(view: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "height width channels"]:
    """Invert the levels from 128 up."""
    inverted: UInt8[np.ndarray, "_ _ _"] = ~view  # 255 - level
    np.minimum(view, inverted, out=inverted)
    return inverted


def write_colour(
    view: UInt8[np.ndarray, "height width channels"], out: UInt8[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Write into `out`, one channel as three equal ones; return `out`."""
    if view.shape[2] == 1:
        cv2.cvtColor(view, cv2.COLOR_GRAY2RGB, dst=out)
    else:
        np.copyto(out, view)
    return out


def _with_channels(view: UInt8[np.ndarray, "height width *channels"]) -> UInt8[np.ndarray, "height width channels"]:
    """Give back the axis of a single channel, which OpenCV drops."""
    return view if view.ndim == 3 else view[:, :, None]
