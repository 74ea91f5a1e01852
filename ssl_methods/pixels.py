"""Pixel operations of augmentation: what torchvision's transforms do to PIL images, with their randomness as arguments.

Every operation takes greyscale ("L") or colour ("RGB") images. Greyscale ones stay so, at a third of the cost: the
result equals that of the same image in three equal channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

CROP_TRIES = 10
_SOLARISED = [value if value < 128 else 255 - value for value in range(256)]


def crop_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Sequence[float],
) -> tuple[int, int, int, int]:
    """Choose the (left, top, right, bottom) of a random resized crop, as torchvision's RandomResizedCrop does.

    Args:
        size: width and height of the image, pixels.
        scale: range of the crop's share of the area.
        ratio: range of its width / height, uniform in the logarithm.
        draws: 4 uniforms a try, CROP_TRIES tries; then the largest centred box within `ratio`.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, 4 * CROP_TRIES, 4):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[start])
        shape = math.exp(low + (high - low) * draws[start + 1])
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[start + 2] * (height - crop_height + 1))
            left = int(draws[start + 3] * (width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def flip(image: Image.Image) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black: 0 is black, 1 the image, 2 twice as bright."""
    return Image.blend(Image.new(image.mode, image.size), image, factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's mean grey level: 0 is flat grey, 1 the image."""
    grey = np.asarray(image if image.mode == "L" else image.convert("L"))
    mean = int(int(grey.sum()) / grey.size + 0.5)
    flat = Image.new(image.mode, image.size, mean if image.mode == "L" else (mean, mean, mean))
    return Image.blend(flat, image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image in grey: 0 is grey, 1 the image."""
    if image.mode == "L":
        return image
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Shift the hue by `turn` of the colour circle, -0.5 to 0.5, in steps of 1/255."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)
    shifted = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (shifted, saturation, value)).convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """Drop the colours (ITU-R 601-2 luma)."""
    return image if image.mode == "L" else image.convert("L")


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with Pillow's approximate Gaussian of standard deviation `sigma` pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def solarise(image: Image.Image) -> Image.Image:
    """Invert the levels from 128 up."""
    return image.point(_SOLARISED * len(image.getbands()))


def to_array(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels in three channels, writable."""
    if image.mode == "L":
        return np.repeat(np.asarray(image)[:, :, None], 3, axis=2)
    return np.array(image)
