"""Views: recipes of crops and augmentations as data, and an image's views as a function of where it is used.

The pixel operations and their order are those of torchvision's transforms on PIL images; the random numbers are a hash
of (seed, epoch, sample, view, operation), so a view is the same on any number of ranks and after any resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ssl_methods import pixels
from ssl_methods.randomness import uniforms

Interpolation = Literal["bicubic", "bilinear"]
RGB = tuple[float, float, float]


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


@dataclass(frozen=True)
class ViewRecipe:
    """All views of an image. `size`: side in pixels; `mean`, `std`: of the data, levels in [0, 1]."""

    name: str
    views: tuple[ViewSpec, ...]
    size: int
    mean: RGB = (0.485, 0.456, 0.406)  # ImageNet
    std: RGB = (0.229, 0.224, 0.225)


def recipe_names() -> tuple[str, ...]:
    """List the recipes."""
    return tuple(sorted(_RECIPES))


def recipe(name: str, size: int) -> ViewRecipe:
    """Return a recipe for views of `size` pixels.

    Raises:
        ValueError: unknown name, or a size below 1.
    """
    if name not in _RECIPES:
        raise ValueError(f"view recipe {name!r}: unknown; choose from {', '.join(recipe_names())}")
    if size < 1:
        raise ValueError(f"view size {size}: must be at least 1 pixel")
    return replace(_RECIPES[name], size=size)


def make_views(
    image: Image.Image, recipe: ViewRecipe, *, seed: int, epoch: int, sample_id: int
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Make all views of one image. Other modes than "L" and "RGB" are converted to RGB."""
    source = _grey_or_colour(image)
    return [
        _make_view(
            source,
            spec,
            side=max(1, round(recipe.size * spec.size_factor)),
            draws=uniforms(seed, epoch=epoch, sample_id=sample_id, view=view, count=_NUM_DRAWS),
        )
        for view, spec in enumerate(recipe.views)
    ]


def eval_view(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Return the image for evaluation: as it is if it is size x size, else resized (bilinear) and centre-cropped.

    The short side becomes size x 8/7, the usual 256 for 224.
    """
    source = _grey_or_colour(image)
    if source.size != (size, size):
        short = round(size * 8 / 7)
        width, height = (short * side // min(source.size) for side in source.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        source = source.resize((width, height), Image.Resampling.BILINEAR)
        source = source.crop((left, top, left + size, top + size))
    return pixels.to_array(source)


def normalise(
    batch: UInt8[Tensor, "batch height width 3"], recipe: ViewRecipe
) -> Float[Tensor, "batch 3 height width"]:
    """Subtract the recipe's mean and divide by its std, on the batch's device, in fp32.

    The result is NCHW in channels-last memory, which convolutions prefer.
    """
    mean = batch.new_tensor([255 * value for value in recipe.mean], dtype=torch.float32).view(3, 1, 1)
    std = batch.new_tensor([255 * value for value in recipe.std], dtype=torch.float32).view(3, 1, 1)
    return (batch.permute(0, 3, 1, 2) - mean) / std


def _make_view(
    image: Image.Image, spec: ViewSpec, *, side: int, draws: Sequence[float]
) -> UInt8[np.ndarray, "side side 3"]:
    box = pixels.crop_box(image.size, scale=spec.crop_scale, ratio=spec.crop_ratio, draws=draws[_CROP:])
    view = image.crop(box).resize((side, side), _RESAMPLING[spec.interpolation])
    if draws[_FLIP] < spec.flip_p:
        view = pixels.flip(view)
    if draws[_JITTER] < spec.jitter_p:
        view = _jitter(view, spec, draws)
    if draws[_GREY] < spec.grayscale_p:
        view = pixels.to_grey(view)
    if draws[_BLUR] < spec.blur_p:
        low, high = spec.blur_sigma
        view = pixels.blur(view, low + (high - low) * draws[_SIGMA])
    if draws[_SOLARISE] < spec.solarise_p:
        view = pixels.solarise(view)
    return pixels.to_array(view)


def _jitter(view: Image.Image, spec: ViewSpec, draws: Sequence[float]) -> Image.Image:
    adjustments = (
        (pixels.adjust_brightness, spec.brightness, _factor(spec.brightness, draws[_BRIGHTNESS])),
        (pixels.adjust_contrast, spec.contrast, _factor(spec.contrast, draws[_CONTRAST])),
        (pixels.adjust_saturation, spec.saturation, _factor(spec.saturation, draws[_SATURATION])),
        (pixels.adjust_hue, spec.hue, spec.hue * (2 * draws[_HUE] - 1)),
    )
    for index in _ORDERS[int(draws[_ORDER] * len(_ORDERS))]:
        adjust, strength, amount = adjustments[index]
        if strength > 0:
            view = adjust(view, amount)
    return view


def _factor(strength: float, draw: float) -> float:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * draw


def _grey_or_colour(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


# Which of a view's uniforms decides what. Append only: another order would change every published number.
_FLIP, _JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARISE, _CROP = range(12)
_NUM_DRAWS = _CROP + 4 * pixels.CROP_TRIES
_ORDERS = tuple(permutations(range(4)))
_RESAMPLING: Mapping[Interpolation, Image.Resampling] = MappingProxyType(
    {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
)

# BYOL's two unequal views (Grill et al. 2020, arXiv:2006.07733, table 6) with Barlow Twins' jitter strengths
_BYOL_FIRST = ViewSpec(
    crop_scale=(0.08, 1.0),
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_p=0.2,
    blur_p=1.0,
)
_BYOL_SECOND = replace(_BYOL_FIRST, blur_p=0.1, solarise_p=0.2)
# Chen et al. 2020, arXiv:2002.05709, appendix A, colour strength 1; blur in pixels as in the views above, where the
# authors' kernel is a tenth of the image wide
_SIMCLR = ViewSpec(
    crop_scale=(0.08, 1.0),
    jitter_p=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale_p=0.2,
    blur_p=0.5,
)
# Chen et al. 2020, arXiv:2003.04297, and the authors' code, where the flip comes last; it commutes with the rest
_MOCO_V2 = replace(
    _SIMCLR, crop_scale=(0.2, 1.0), interpolation="bilinear", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
# Caron et al. 2021, arXiv:2104.14294, and the authors' code: BYOL's photometrics, large crops first, then small ones
_DINO_FIRST = replace(_BYOL_FIRST, crop_scale=(0.4, 1.0))
_DINO_SECOND = replace(_BYOL_SECOND, crop_scale=(0.4, 1.0))
_DINO_LOCAL = replace(_BYOL_FIRST, crop_scale=(0.05, 0.4), blur_p=0.5, size_factor=96 / 224)
_SUPERVISED = ViewSpec(crop_scale=(0.08, 1.0), interpolation="bilinear")
# Ours, for grey images of about 28 px: small crops, blur and solarisation would destroy them
_SMALL_GREY = ViewSpec(crop_scale=(0.3, 1.0), jitter_p=0.8, brightness=0.4, contrast=0.4)
_SMALL_GLOBAL = replace(_SMALL_GREY, crop_scale=(0.4, 1.0))
_SMALL_LOCAL = replace(_SMALL_GREY, crop_scale=(0.1, 0.4), size_factor=16 / 28)
_SMALL_DINO = (_SMALL_GLOBAL, _SMALL_GLOBAL, _SMALL_LOCAL, _SMALL_LOCAL)
_SMALL_GREY_SUPERVISED = ViewSpec(crop_scale=(0.6, 1.0))
_FASHION_MNIST_MEAN: RGB = (0.2860, 0.2860, 0.2860)
_FASHION_MNIST_STD: RGB = (0.3530, 0.3530, 0.3530)

_RECIPES: Mapping[str, ViewRecipe] = MappingProxyType(
    {
        each.name: each
        for each in (
            ViewRecipe("barlow_twins", (_BYOL_FIRST, _BYOL_SECOND), 224),
            ViewRecipe("simclr", (_SIMCLR, _SIMCLR), 224),
            ViewRecipe("moco_v2", (_MOCO_V2, _MOCO_V2), 224),
            ViewRecipe("dino", (_DINO_FIRST, _DINO_SECOND, *[_DINO_LOCAL] * 8), 224),
            ViewRecipe("supervised", (_SUPERVISED,), 224),
            ViewRecipe("small_grey", (_SMALL_GREY, _SMALL_GREY), 28, _FASHION_MNIST_MEAN, _FASHION_MNIST_STD),
            ViewRecipe("small_dino", _SMALL_DINO, 28, _FASHION_MNIST_MEAN, _FASHION_MNIST_STD),
            ViewRecipe("small_grey_supervised", (_SMALL_GREY_SUPERVISED,), 28, _FASHION_MNIST_MEAN, _FASHION_MNIST_STD),
        )
    }
)
