"""Views in two halves: decode, crop and flip on the CPU, colours, blur and solarisation in batches on the device.

The random numbers are those of `make_views`; they travel with the pixels as one row of parameters for each view. Levels
are rounded once, at the end: a blurred view differs by rounding from the one made on the CPU, others are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import pad

from ssl_methods import pixels
from ssl_methods.colour import Step
from ssl_methods.view_plan import ViewPlan, plan_view
from ssl_methods.views import ViewRecipe, check_image_array, view_arrays, view_sides

Images = Float[Tensor, "batch 3 side side"]  # levels 0 to 255
Amounts = Float[Tensor, " batch"]
Column = Float[Tensor, "batch 1 1 1"]
Operation = Callable[[Images, Column], Images]

# Layout of a row: for each place in the jitter's order the step's number (or _NO_STEP) and its amount, then the rest.
_PLACES = len(Step)
_NO_STEP = -1.0
_GREY, _SIGMA, _SOLARISE = range(2 * _PLACES, 2 * _PLACES + 3)
NUM_PARAMETERS = 2 * _PLACES + 3


def crop_views(
    image: UInt8[np.ndarray, "height width channels"],
    recipe: ViewRecipe,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    out: Sequence[UInt8[np.ndarray, "_ _ 3"]] | None = None,
) -> list[tuple[UInt8[np.ndarray, "_ _ 3"], Float32[np.ndarray, " parameters"]]]:
    """Crop, resize and flip all views of one image; colours are left to `finish_views`.

    Args:
        image: one channel (grey) or three; any strides that are not negative.
        out: an array for each view, of `view_sides`: rows of batches. Without it new ones are made.

    Returns:
        For each view its pixels and its row of NUM_PARAMETERS parameters.

    Raises:
        ValueError: `image` or an array of `out` has another shape or dtype, or `out` cannot be written to.
    """
    check_image_array(image)
    out = view_arrays(view_sides(recipe), out)
    size = image.shape[1], image.shape[0]
    return [
        _crop(image, plan_view(spec, size, seed=seed, epoch=epoch, sample_id=sample_id, view=view), target)
        for view, (spec, target) in enumerate(zip(recipe.views, out, strict=True))
    ]


@torch.no_grad()
def finish_views(
    batch: UInt8[Tensor, "batch side side 3"], parameters: Float[Tensor, "batch parameters"]
) -> UInt8[Tensor, "batch side side 3"]:
    """Apply colours, blur and solarisation to a batch, each view with its own parameters, on the batch's device.

    Args:
        batch: views of `crop_views`, on any device.
        parameters: their rows. Best on the CPU: they say which views an operation concerns, and reading them from the
            device waits for it.

    Returns:
        The finished views, new.
    """
    rows = parameters.to("cpu", torch.float32)
    views = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for place in range(_PLACES):
        steps, amounts = rows[:, 2 * place], rows[:, 2 * place + 1]
        for step, operation in _OPERATIONS.items():
            _change(views, steps == step, operation, amounts)
    _change(views, rows[:, _GREY] > 0, _drop_colours, rows[:, _GREY])
    sigmas = rows[:, _SIGMA]
    _change(views, sigmas > 0, partial(_blur, reach=pixels.blur_reach(float(sigmas.max()))), sigmas)
    _change(views, rows[:, _SOLARISE] > 0, _solarise, rows[:, _SOLARISE])
    return views.add_(0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _crop(
    image: UInt8[np.ndarray, "height width channels"], plan: ViewPlan, out: UInt8[np.ndarray, "side side 3"]
) -> tuple[UInt8[np.ndarray, "side side 3"], Float32[np.ndarray, " parameters"]]:
    left, top, right, bottom = plan.box
    view = pixels.resize(image[top:bottom, left:right], out.shape[:2], plan.interpolation)
    row = np.full(NUM_PARAMETERS, _NO_STEP, np.float32)
    for place, (step, amount) in enumerate(plan.steps):
        row[2 * place : 2 * place + 2] = step, amount
    row[_GREY:] = plan.grey, plan.blur_sigma, plan.solarise
    return pixels.write_colour(pixels.flip(view) if plan.flip else view, out), row


def _change(views: Images, concerned: Bool[Tensor, " batch"], operation: Operation, amounts: Amounts) -> None:
    """Replace the views that are concerned. Both tensors that say so are on the CPU: nothing waits for the device."""
    index = concerned.nonzero()[:, 0]
    if len(index) == 0:
        return
    here = index.to(views.device, non_blocking=True)
    chosen = amounts[index].to(views.device, non_blocking=True).view(-1, 1, 1, 1)
    views[here] = operation(views[here], chosen)


def _brighten(views: Images, factors: Column) -> Images:
    return (views * factors).clamp_(0, 255)


def _contrast(views: Images, factors: Column) -> Images:
    # In integers the order of the sum does not matter, so a view does not depend on its batch.
    sums = (_luma(views) * 4096 + 0.5).to(torch.int32).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    means = (sums / (4096 * views[0, 0].numel())).to(torch.float32)
    return (views * factors + (1 - factors) * means).clamp_(0, 255)


def _saturate(views: Images, factors: Column) -> Images:
    return (views * factors + (1 - factors) * _luma(views)).clamp_(0, 255)


def _turn_hue(views: Images, turns: Column) -> Images:
    """Turn the hue, a place on a circle of six: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5."""
    red, green, blue = views[:, 0:1], views[:, 1:2], views[:, 2:3]
    high, low = views.amax(dim=1, keepdim=True), views.amin(dim=1, keepdim=True)
    chroma = high - low
    redmost, greenmost = high == red, high == green
    side = torch.where(redmost, green - blue, torch.where(greenmost, blue - red, red - green))
    offset = torch.where(redmost, 0.0, torch.where(greenmost, 2.0, 4.0))
    hue = side / torch.where(chroma > 0, chroma, 1.0) + offset + 6 * turns
    hue = torch.where(hue < 0, hue + 6, hue)
    hue = torch.where(hue >= 6, hue - 6, hue)
    weights = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=1)
    return low + chroma * weights.clamp_(0, 1)


def _drop_colours(views: Images, _: Column) -> Images:
    return _luma(views).expand_as(views)


def _luma(views: Images) -> Float[Tensor, "batch 1 side side"]:
    red, green, blue = views[:, 0:1], views[:, 1:2], views[:, 2:3]
    luma: Tensor = 0.2989 * red + 0.587 * green + 0.114 * blue
    return luma


def _blur(views: Images, sigmas: Column, *, reach: int) -> Images:
    """Blur along one axis, then the other, as a sum of shifted views: exact float32 on every device."""
    side = views.shape[2]
    reach = min(reach, side - 1)  # farther ones cannot be mirrored
    # In float64, so that a kernel rounds to the same float32 whatever the widest one is.
    offsets = torch.arange(-reach, reach + 1, device=views.device, dtype=torch.float64)
    own = offsets.abs() <= torch.floor(4 * sigmas + 0.5)  # `reach` is that of the widest kernel
    kernels = torch.exp(-(offsets**2) / (2 * sigmas**2)) * own
    kernels = (kernels / kernels.sum(dim=3, keepdim=True)).to(torch.float32)
    for padding, dim in (((reach, reach, 0, 0), 3), ((0, 0, reach, reach), 2)):
        padded, views = pad(views, padding, mode="reflect"), torch.zeros_like(views)
        for shift in range(2 * reach + 1):
            views.addcmul_(padded.narrow(dim, shift, side), kernels[..., shift, None])
    return views


def _solarise(views: Images, _: Column) -> Images:
    return torch.minimum(views, 255 - views)


_OPERATIONS: Mapping[Step, Operation] = MappingProxyType(
    {Step.BRIGHTNESS: _brighten, Step.CONTRAST: _contrast, Step.SATURATION: _saturate, Step.HUE: _turn_hue}
)
