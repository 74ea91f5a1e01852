"""Views made by torchvision: what the fast path is measured against, and what to choose to rule it out.

Crop and resize are torchvision's on a Pillow image, everything after that `transforms.v2` on float32 levels in [0, 1],
rounded to uint8 once at the end. The fast path differs by rounding: it resizes in 8-bit fixed point and rounds before
and after the blur. Contrast, saturation and grey of one channel are those of three equal ones, in both.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from ssl_methods.colour import Step
from ssl_methods.view_plan import ViewPlan


def reference_view(
    image: UInt8[np.ndarray, "height width channels"], plan: ViewPlan, *, side: int
) -> UInt8[np.ndarray, "side side 3"]:
    """Make one view as planned with torchvision."""
    colour = np.broadcast_to(image, (*image.shape[:2], 3))
    left, top, right, bottom = plan.box
    mode = InterpolationMode(plan.interpolation)
    size = bottom - top, right - left
    crop = torchvision.resized_crop(Image.fromarray(np.ascontiguousarray(colour)), top, left, *size, [side, side], mode)
    view = torchvision.to_dtype(torchvision.pil_to_tensor(crop), torch.float32, scale=True)
    if plan.flip:
        view = torchvision.horizontal_flip(view)
    for step, amount in plan.steps:
        view = adjust(view, step, amount)
    if plan.grey:
        view = torchvision.rgb_to_grayscale(view, num_output_channels=3)
    if plan.blur_sigma > 0:
        view = blur(view, plan.blur_sigma)
    if plan.solarise:
        view = torchvision.solarize(view, 128 / 255)
    levels: UInt8[np.ndarray, "_ _ 3"] = (view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return levels


def adjust(view: Float[Tensor, "3 height width"], step: Step, amount: float) -> Float[Tensor, "3 height width"]:
    """Apply one operation of the colour jitter."""
    adjusted: Tensor = _ADJUSTMENTS[step](view, amount)
    return adjusted


def blur(view: Float[Tensor, "3 height width"], sigma: float) -> Float[Tensor, "3 height width"]:
    """Blur with BYOL's kernel of 23 pixels, or the largest that torchvision can mirror at the edges of a small view."""
    reach = min(11, view.shape[1] - 1, view.shape[2] - 1)
    blurred: Tensor = torchvision.gaussian_blur(view, [2 * reach + 1] * 2, [sigma, sigma])
    return blurred


_ADJUSTMENTS = {
    Step.BRIGHTNESS: torchvision.adjust_brightness,
    Step.CONTRAST: torchvision.adjust_contrast,
    Step.SATURATION: torchvision.adjust_saturation,
    Step.HUE: torchvision.adjust_hue,
}
