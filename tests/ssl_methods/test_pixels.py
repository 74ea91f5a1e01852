"""Each operation against torchvision's functional one on PIL images, with the same parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop

from ssl_methods import pixels


def photo(width: int = 37, height: int = 29) -> Image.Image:
    """Smooth colour waves with noise: all levels, all hues."""
    y, x, channel = np.mgrid[:height, :width, :3]
    waves = 127 + 110 * np.sin(0.31 * x + 0.17 * y * (channel + 1) + channel)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


COLOUR = photo()
GREY = photo().convert("L")
GREY_IN_COLOUR = GREY.convert("RGB")
IMAGES = [COLOUR, GREY, Image.new("RGB", (5, 4), (3, 200, 90)), Image.new("L", (1, 1), 255)]


def same(actual: Image.Image, expected: Image.Image) -> bool:
    return actual.mode == expected.mode and np.array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.37, 2.0])
def test_factors_equal_torchvision(image: Image.Image, factor: float) -> None:
    assert same(pixels.adjust_brightness(image, factor), reference.adjust_brightness(image, factor))
    assert same(pixels.adjust_contrast(image, factor), reference.adjust_contrast(image, factor))
    assert same(pixels.adjust_saturation(image, factor), reference.adjust_saturation(image, factor))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.001, 0.0, 0.07, 0.5])
def test_hue_equals_torchvision(image: Image.Image, turn: float) -> None:
    assert same(pixels.adjust_hue(image, turn), reference.adjust_hue(image, turn))


@pytest.mark.parametrize("image", IMAGES)
def test_flip_grey_and_solarise_equal_torchvision(image: Image.Image) -> None:
    assert same(pixels.flip(image), reference.hflip(image))
    assert same(pixels.to_grey(image).convert("RGB"), reference.to_grayscale(image, num_output_channels=3))
    assert same(pixels.solarise(image), reference.solarize(image, 128))


@pytest.mark.parametrize("sigma", [0.1, 0.9, 2.0])
def test_blur_is_pillows_gaussian(sigma: float) -> None:
    assert same(pixels.blur(COLOUR, sigma), COLOUR.filter(ImageFilter.GaussianBlur(radius=sigma)))


def test_grey_images_give_what_they_give_in_three_channels() -> None:
    operations = [
        lambda image: pixels.adjust_brightness(image, 1.3),
        lambda image: pixels.adjust_contrast(image, 0.7),
        lambda image: pixels.adjust_saturation(image, 1.9),
        lambda image: pixels.adjust_hue(image, 0.2),
        lambda image: pixels.blur(image, 1.1),
        pixels.to_grey,
        pixels.solarise,
        pixels.flip,
        lambda image: image.crop((3, 4, 30, 20)).resize((28, 28), Image.Resampling.BICUBIC),
    ]
    for operation in operations:
        in_colour = pixels.to_array(operation(GREY_IN_COLOUR))
        assert np.array_equal(pixels.to_array(operation(GREY)), in_colour)


def test_arrays_have_three_channels_and_can_be_written() -> None:
    for image in (GREY, COLOUR):
        array = pixels.to_array(image)
        assert (array.shape, array.dtype, array.flags.writeable) == ((29, 37, 3), np.uint8, True)


@settings(max_examples=50)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_crop_lies_inside_the_image(width: int, height: int, draws: list[float]) -> None:
    left, top, right, bottom = pixels.crop_box((width, height), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), draws=draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(28, 28), (40, 30), (200, 20), (15, 200)])
def test_crop_equals_torchvision_given_the_same_draws(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    draws = np.random.default_rng(5).random(4 * pixels.CROP_TRIES).tolist()
    # torchvision asks for area and ratio, and, only once these fit, for top and left
    tries = iter(draws[start : start + 4] for start in range(0, len(draws), 4))
    current: list[float] = []

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        if not current or len(current) == 2:
            current[:] = next(tries)
        return torch.tensor([low + (high - low) * current.pop(0)], dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([low + int(current.pop(0) * (high - low))])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", randint)
    top, left, height, width = RandomResizedCrop.get_params(Image.new("L", size), list(scale), list(ratio))
    expected = (left, top, left + width, top + height)
    assert pixels.crop_box(size, scale=scale, ratio=ratio, draws=draws) == expected


def test_crop_of_an_impossible_shape_is_the_largest_centred_one() -> None:
    box = pixels.crop_box((300, 30), scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3), draws=[0.5] * 40)
    assert box == (130, 0, 170, 30)


def test_crop_areas_are_uniform() -> None:
    draws = np.random.default_rng(0).random((2000, 40)).tolist()
    boxes = [pixels.crop_box((1000, 1000), scale=(0.1, 0.5), ratio=(0.99, 1.01), draws=each) for each in draws]
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    assert float(np.mean(areas)) == pytest.approx(0.3, abs=4 * 0.4 / math.sqrt(12 * 2000))  # four standard errors
    assert min(areas) >= 0.0995
    assert max(areas) <= 0.5005
