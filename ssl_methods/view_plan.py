"""What happens to one view, decided before any pixel is touched.

The random numbers are a hash of (seed, epoch, sample, view, operation), so a view is the same on any number of ranks,
after any resume, and whoever makes the pixels: the fast path, torchvision or the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

from ssl_methods.colour import Step
from ssl_methods.pixels import Box, Interpolation
from ssl_methods.randomness import uniforms


@dataclass(frozen=True)
class ViewSpec:
    """How one view is made: crop, flip, colour jitter, grey, blur, solarise, in this order.

    Attributes:
        crop_scale, crop_ratio: share of the image's area, and width / height, of the random resized crop.
        interpolation: how the crop is resized (with antialiasing).
        flip_p, jitter_p, grayscale_p, blur_p, solarise_p: probabilities.
        brightness, contrast, saturation: the jitter's factors are uniform in [1 - x, 1 + x], not below 0.
        hue: the jitter's turn of the colour circle is uniform in [-x, x].
        blur_sigma: range of the blur's standard deviation, pixels.
        size_factor: side of the view as a share of the recipe's size (small crops of multi-crop recipes).
    """

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip_p: float = 0.5
    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    size_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """One view with nothing left to chance. In this order: crop, flip, steps, grey, blur, solarise.

    Attributes:
        box: left, top, right, bottom of the crop, pixels.
        steps: operations of the colour jitter with their amounts, in order.
        blur_sigma: standard deviation, pixels; 0 for no blur.
    """

    box: Box
    interpolation: Interpolation
    flip: bool
    steps: tuple[tuple[Step, float], ...]
    grey: bool
    blur_sigma: float
    solarise: bool


def plan_view(spec: ViewSpec, size: tuple[int, int], *, seed: int, epoch: int, sample_id: int, view: int) -> ViewPlan:
    """Decide everything about one view of an image of `size` (width, height)."""
    draw = partial(uniforms, seed, epoch=epoch, sample_id=sample_id, view=view)
    draws = draw(count=_CROP + 4 * _USUAL_TRIES)
    box = (
        random_box(size, scale=spec.crop_scale, ratio=spec.crop_ratio, draws=draws[_CROP:])
        or random_box(size, scale=spec.crop_scale, ratio=spec.crop_ratio, draws=draw(count=_NUM_DRAWS)[_CROP:])
        or largest_box(size, ratio=spec.crop_ratio)
    )
    low, high = spec.blur_sigma
    return ViewPlan(
        box=box,
        interpolation=spec.interpolation,
        flip=draws[_FLIP] < spec.flip_p,
        steps=_jitter(spec, draws) if draws[_JITTER] < spec.jitter_p else (),
        grey=draws[_GREY] < spec.grayscale_p,
        blur_sigma=low + (high - low) * draws[_SIGMA] if draws[_BLUR] < spec.blur_p else 0.0,
        solarise=draws[_SOLARISE] < spec.solarise_p,
    )


def random_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Sequence[float],
) -> Box | None:
    """Choose the (left, top, right, bottom) of a random resized crop, as torchvision's RandomResizedCrop does.

    Args:
        size: width and height of the image, pixels.
        scale: range of the crop's share of the area.
        ratio: range of its width / height, uniform in the logarithm.
        draws: 4 uniforms a try.

    Returns:
        The first box that fits into the image, or None; torchvision takes `largest_box` after ten tries.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, len(draws), 4):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[start])
        shape = math.exp(low + (high - low) * draws[start + 1])
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[start + 2] * (height - crop_height + 1))
            left = int(draws[start + 3] * (width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    return None


def largest_box(size: tuple[int, int], *, ratio: tuple[float, float]) -> Box:
    """Return the largest centred box whose width / height lies within `ratio`."""
    width, height = size
    crop_width, crop_height = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _jitter(spec: ViewSpec, draws: Sequence[float]) -> tuple[tuple[Step, float], ...]:
    strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    amounts = (
        _factor(spec.brightness, draws[_BRIGHTNESS]),
        _factor(spec.contrast, draws[_CONTRAST]),
        _factor(spec.saturation, draws[_SATURATION]),
        spec.hue * (2 * draws[_HUE] - 1),
    )
    order = _ORDERS[int(draws[_ORDER] * len(_ORDERS))]
    return tuple([(step, amounts[step]) for step in order if strengths[step] > 0])


def _factor(strength: float, draw: float) -> float:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * draw


_CROP_TRIES = 10
# Nearly always enough; more draws cost more than all else here.
_USUAL_TRIES = 3
# Which of a view's uniforms decides what. Append only: another order would change every published number.
_FLIP, _JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARISE, _CROP = range(12)
_NUM_DRAWS = _CROP + 4 * _CROP_TRIES
_ORDERS = tuple(permutations(Step))
