"""Views: recipes of crops and augmentations as data, and an image's views as a function of where it is used.

What happens to a view is decided in `view_plan`; here it is done to the pixels, on uint8 arrays, by one of two paths
with the same parameters: "fast" (`pixels`, `colour`) or "reference" (torchvision, `reference_views`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_methods.colour import recolour
from ssl_methods.pixels import blur, flip, resize, solarise, write_colour
from ssl_methods.view_plan import ViewPlan, ViewSpec, plan_view

Pixels = Literal["fast", "reference"]
RGB = tuple[float, float, float]

_UINT8 = np.dtype(np.uint8)
# Times the shorter side: far more than the middle seven eighths of a square and the reach of the resize.
_LONGEST_FOR_EVALUATION = 8


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


def view_sides(recipe: ViewRecipe) -> tuple[int, ...]:
    """Return the side of each view in pixels, in order."""
    return tuple(max(1, round(recipe.size * spec.size_factor)) for spec in recipe.views)


def make_views(
    image: UInt8[np.ndarray, "height width channels"],
    recipe: ViewRecipe,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    pixels: Pixels = "fast",
    out: Sequence[UInt8[np.ndarray, "_ _ 3"]] | None = None,
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Make all views of one image.

    Args:
        image: one channel (grey) or three; any strides that are not negative.
        pixels: "fast", or "reference" for torchvision's transforms at several times the cost; the views differ by
            rounding (see `reference_views`).
        out: an array for each view, of `view_sides`: rows of batches. Without it new ones are made.

    Returns:
        The views; the arrays of `out`, if given.

    Raises:
        ValueError: `image` or an array of `out` has another shape or dtype, or `out` cannot be written to.
    """
    check_image_array(image)
    out = view_arrays(view_sides(recipe), out)
    height, width, _ = image.shape
    draw = _fast_view if pixels == "fast" else _reference_view
    for view, (spec, target) in enumerate(zip(recipe.views, out, strict=True)):
        plan = plan_view(spec, (width, height), seed=seed, epoch=epoch, sample_id=sample_id, view=view)
        draw(image, plan, target)
    return out


def view_arrays(
    sides: Sequence[int], out: Sequence[npt.NDArray[np.generic]] | None
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Return the arrays to write views of these sides into: those of `out`, checked, or new ones.

    Raises:
        ValueError: names the view whose array does not fit.
    """
    if out is None:
        return [np.empty((side, side, 3), np.uint8) for side in sides]
    if len(out) != len(sides):
        raise ValueError(f"out: {len(out)} arrays for {len(sides)} views")
    for view, (array, side) in enumerate(zip(out, sides, strict=True)):
        # OpenCV takes positive strides with the channels side by side.
        whole = array.strides[1:] == (3, 1) and array.strides[0] > 0 if array.ndim == 3 else False
        if array.shape != (side, side, 3) or array.dtype != _UINT8 or not array.flags.writeable or not whole:
            kind = "writable" if array.flags.writeable else "read-only"
            raise ValueError(
                f"out, view {view}: {kind} {array.dtype} of shape {array.shape} and strides {array.strides}, must be "
                f"writable uint8 of shape {(side, side, 3)}, rows in order and contiguous"
            )
    return list(out)


def check_image_array(image: npt.NDArray[np.generic]) -> None:
    """Raise ValueError unless `image` is one to make views of: uint8 (height, width, 1 or 3), not empty."""
    if image.dtype != _UINT8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        raise ValueError(
            f"image: {image.dtype} of shape {image.shape}, must be uint8 of shape (height, width, 1 or 3), not empty"
        )


def eval_view(
    image: UInt8[np.ndarray, "height width channels"],
    size: int,
    *,
    out: UInt8[np.ndarray, "size size 3"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Return the image for evaluation: as it is if it is size x size, else resized (bilinear) and centre-cropped.

    The short side becomes size x 8/7, the usual 256 for 224. Of an image more than 8 times as long as wide, or as wide
    as long, only the middle is resized: that may shift the view by half a pixel. Writes into `out`, if given, and
    returns it.

    Raises:
        ValueError: `image` or `out` has another shape or dtype, or `out` cannot be written to.
    """
    check_image_array(image)
    (target,) = view_arrays((size,), None if out is None else (out,))
    if image.shape[:2] != (size, size):
        height, width, _ = image.shape
        (rows, new_height, view_rows), (columns, new_width, view_columns) = (
            _plan_evaluation(length, min(height, width), size) for length in (height, width)
        )
        image = resize(image[rows, columns], (new_height, new_width), "bilinear")[view_rows, view_columns]
    return write_colour(image, target)


def normalise(
    batch: UInt8[Tensor, "batch height width 3"], recipe: ViewRecipe
) -> Float[Tensor, "batch 3 height width"]:
    """Subtract the recipe's mean and divide by its std, on the batch's device, in fp32.

    The result is NCHW in channels-last memory, which convolutions prefer.
    """
    mean = batch.new_tensor([255 * value for value in recipe.mean], dtype=torch.float32).view(3, 1, 1)
    std = batch.new_tensor([255 * value for value in recipe.std], dtype=torch.float32).view(3, 1, 1)
    return (batch.permute(0, 3, 1, 2) - mean) / std


def _plan_evaluation(length: int, shorter: int, size: int) -> tuple[slice, int, slice]:
    """Plan one axis of an evaluation view, of an image whose shorter side is known.

    Returns:
        The pixels to resize, how many they become, and which of these are the view.
    """
    short = round(size * 8 / 7)
    first = round((short * length // shorter - size) / 2)
    if length <= _LONGEST_FOR_EVALUATION * shorter:
        return slice(0, length), short * length // shorter, slice(first, first + size)
    # So many pixels become a whole number of new ones, which lie as they would if all were resized.
    period = shorter // math.gcd(shorter, short)
    skipped = (length - _LONGEST_FOR_EVALUATION * shorter) // (2 * period)
    first -= skipped * period * short // shorter
    start = skipped * period
    stop = start + _LONGEST_FOR_EVALUATION * shorter
    return slice(start, stop), _LONGEST_FOR_EVALUATION * short, slice(first, first + size)


def _fast_view(
    image: UInt8[np.ndarray, "height width channels"], plan: ViewPlan, out: UInt8[np.ndarray, "side side 3"]
) -> None:
    left, top, right, bottom = plan.box
    view = resize(image[top:bottom, left:right], out.shape[:2], plan.interpolation)
    if plan.flip:
        view = flip(view)
    if plan.steps or plan.grey:
        view = recolour(view, plan.steps, grey=plan.grey)
    if plan.blur_sigma > 0:
        view = blur(view, plan.blur_sigma)
    if plan.solarise:
        view = solarise(view)
    write_colour(view, out)


def _reference_view(
    image: UInt8[np.ndarray, "height width channels"], plan: ViewPlan, out: UInt8[np.ndarray, "side side 3"]
) -> None:
    from ssl_methods.reference_views import reference_view  # torchvision takes a second to import

    np.copyto(out, reference_view(image, plan, side=out.shape[0]))


# BYOL's two unequal views (Grill et al. 2020, arXiv:2006.07733, table 6), with Barlow Twins' strengths of jitter;
# VICReg (arXiv:2105.04906, the authors' code) and triplet use the same
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
_BYOL = (_BYOL_FIRST, _BYOL_SECOND)
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
# Chen et al. 2020, arXiv:2003.04297, and the authors' code, where the flip comes last; it commutes with the rest.
# SimSiam (arXiv:2011.10566, section 4) and DisCo (arXiv:2104.09124) use the same views.
_MOCO_V2 = replace(
    _SIMCLR, crop_scale=(0.2, 1.0), interpolation="bilinear", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
# Shen et al. 2021, arXiv:2102.08946: the authors' code is milder than MoCo v2, from which it comes
_S2_BNN = replace(_MOCO_V2, jitter_p=0.6, blur_p=0.2)
# Caron et al. 2020, arXiv:2006.09882, and the authors' code: SimCLR's photometrics, two large crops and six small ones
_SWAV_LARGE = replace(_SIMCLR, crop_scale=(0.14, 1.0), interpolation="bilinear")
_SWAV_SMALL = replace(_SWAV_LARGE, crop_scale=(0.05, 0.14), size_factor=96 / 224)
# Caron et al. 2021, arXiv:2104.14294, and the authors' code: BYOL's photometrics, large crops first, then small ones.
# EsViT (Li et al. 2022, arXiv:2106.09785) uses the same.
_DINO_LARGE = (replace(_BYOL_FIRST, crop_scale=(0.4, 1.0)), replace(_BYOL_SECOND, crop_scale=(0.4, 1.0)))
_DINO_SMALL = replace(_BYOL_FIRST, crop_scale=(0.05, 0.4), blur_p=0.5, size_factor=96 / 224)
_DINO = (*_DINO_LARGE, *[_DINO_SMALL] * 8)
_SUPERVISED = ViewSpec(crop_scale=(0.08, 1.0), interpolation="bilinear")
# Ours, for grey images of about 28 px: small crops, blur and solarisation would destroy them
_SMALL_GREY = ViewSpec(crop_scale=(0.3, 1.0), jitter_p=0.8, brightness=0.4, contrast=0.4)
_SMALL_GLOBAL = replace(_SMALL_GREY, crop_scale=(0.4, 1.0))
_SMALL_LOCAL = replace(_SMALL_GREY, crop_scale=(0.1, 0.4), size_factor=16 / 28)
_SMALL_DINO = (_SMALL_GLOBAL, _SMALL_GLOBAL, _SMALL_LOCAL, _SMALL_LOCAL)
_SMALL_GREY_SUPERVISED = ViewSpec(crop_scale=(0.6, 1.0))

_PHOTOGRAPHS: Mapping[str, tuple[ViewSpec, ...]] = {
    "barlow_twins": _BYOL,
    "byol": _BYOL,
    "dino": _DINO,
    "disco": (_MOCO_V2, _MOCO_V2),
    "esvit": _DINO,
    "moco_v2": (_MOCO_V2, _MOCO_V2),
    "s2_bnn": (_S2_BNN, _S2_BNN),
    "simclr": (_SIMCLR, _SIMCLR),
    "simsiam": (_MOCO_V2, _MOCO_V2),
    "supervised": (_SUPERVISED,),
    "swav": (_SWAV_LARGE, _SWAV_LARGE, *[_SWAV_SMALL] * 6),
    "triplet": _BYOL,
    "vicreg": _BYOL,
}
_SMALL_IMAGES: Mapping[str, tuple[ViewSpec, ...]] = {
    "small_dino": _SMALL_DINO,
    "small_grey": (_SMALL_GREY, _SMALL_GREY),
    "small_grey_supervised": (_SMALL_GREY_SUPERVISED,),
}
_FASHION_MNIST_MEAN: RGB = (0.2860, 0.2860, 0.2860)
_FASHION_MNIST_STD: RGB = (0.3530, 0.3530, 0.3530)
_RECIPES: Mapping[str, ViewRecipe] = MappingProxyType(
    {name: ViewRecipe(name, views, 224) for name, views in _PHOTOGRAPHS.items()}
    | {
        name: ViewRecipe(name, views, 28, _FASHION_MNIST_MEAN, _FASHION_MNIST_STD)
        for name, views in _SMALL_IMAGES.items()
    }
)
