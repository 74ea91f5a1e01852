"""Each pixel operation against Pillow, torchvision or its formula, with the same parameters."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torchvision.transforms.functional as torchvision
from jaxtyping import UInt8
from PIL import Image

from ssl_methods.pixels import Interpolation, blur, flip, resize, solarise, write_colour
from tests.ssl_methods.photos import COLOUR, GREY, GREY_IN_COLOUR, photo

# height, width: wide, nearly square, square, of the size of views, and those around which Pillow 13 changes the order
CROPS = [(375, 500), (241, 190), (60, 50), (224, 224), (200, 200), (190, 300), (376, 300), (377, 300), (500, 224)]
IMAGES = [COLOUR, GREY, np.full((4, 5, 3), (3, 200, 90), np.uint8), np.full((1, 1, 1), 255, np.uint8)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [224, 96, 28])
@pytest.mark.parametrize("crop", [*CROPS, *[crop[::-1] for crop in CROPS]])
def test_resize_equals_pillow_but_for_rounding(interpolation: Interpolation, crop: tuple[int, int], side: int) -> None:
    image = photo(500, 500)[: crop[0], : crop[1]]
    resized = resize(image, (side, side), interpolation)
    method = Image.Resampling[interpolation.upper()]
    pillows = Image.fromarray(np.ascontiguousarray(image)).resize((side, side), method)
    differences = np.abs(resized.astype(int) - np.asarray(pillows))
    # Both work in fixed point and round between the two axes; torch's weights have 15 bits, Pillow's 22.
    assert differences.mean() <= 0.03 and differences.max() <= 2


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_axes_are_resized_in_pillows_order(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 200, (300, 2)).tolist():
        tallest = size[0] + 2 * max(0, width - size[1])  # that Pillow resizes left and right first
        for rows in {height, tallest, tallest + 1}:
            image = random.integers(0, 256, (rows, width, 1), dtype=np.uint8)
            pillows = Image.fromarray(image[:, :, 0]).resize(size[::-1], Image.Resampling.BICUBIC)
            differences = np.abs(resize(image, size, "bicubic")[:, :, 0].astype(int) - np.asarray(pillows))
            # Noise rounds at its worst: the other order is off by 0.1 to 0.4 in the mean where both axes change.
            assert differences.mean() <= 0.03, (rows, width)


def test_resize_needs_no_copy_of_a_crop() -> None:
    image = photo(50, 40)
    crop = image[3:30, 7:45]
    for channels in (crop, crop[:, :, 1:2]):
        np.testing.assert_array_equal(
            resize(channels, (24, 24), "bicubic"), resize(np.ascontiguousarray(channels), (24, 24), "bicubic")
        )


@pytest.mark.parametrize("image", IMAGES)
def test_flip_and_solarise_equal_torchvision(image: UInt8[np.ndarray, "height width channels"]) -> None:
    pillow = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    np.testing.assert_array_equal(flip(image), np.asarray(torchvision.hflip(pillow)).reshape(image.shape))
    np.testing.assert_array_equal(solarise(image), np.asarray(torchvision.solarize(pillow, 128)).reshape(image.shape))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.4, 2.0])
@pytest.mark.parametrize("image", [photo(120, 90), GREY], ids=["colour", "grey"])
def test_blur_is_the_true_gaussian(image: UInt8[np.ndarray, "height width channels"], sigma: float) -> None:
    exact = np.floor(gaussian(gaussian(image.astype(float), sigma, axis=0), sigma, axis=1) + 0.5)
    differences = np.abs(blur(image, sigma) - exact)
    # The kernel ends at four standard deviations and is in float32: a tie now and then goes the other way.
    assert differences.mean() <= 0.005 and differences.max() <= 1


def gaussian(levels: npt.NDArray[np.float64], sigma: float, *, axis: int) -> npt.NDArray[np.float64]:
    """Blur along an axis in float64 with mirrored edges and eight standard deviations of kernel."""
    reach = min(int(8 * sigma) + 1, levels.shape[axis] - 1)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    padded = np.pad(levels, [(reach, reach) if number == axis else (0, 0) for number in range(3)], mode="reflect")
    shifted = [padded.take(range(start, start + levels.shape[axis]), axis) for start in range(2 * reach + 1)]
    return np.tensordot(weights / weights.sum(), shifted, 1)


def test_grey_images_give_what_they_give_in_three_channels() -> None:
    operations = [flip, solarise, lambda image: resize(image[4:20, 3:30], (28, 28), "bicubic")]
    for operation in operations:
        np.testing.assert_array_equal(as_colour(operation(GREY)), operation(GREY_IN_COLOUR))
    # the vectors of one channel end elsewhere in the row, and their last float bit decides a tie
    differences = as_colour(blur(GREY, 1.1)).astype(int) - blur(GREY_IN_COLOUR, 1.1)
    assert np.abs(differences).max() <= 1 and np.abs(differences).mean() < 1e-3


def as_colour(view: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "height width 3"]:
    return write_colour(view, np.empty((*view.shape[:2], 3), np.uint8))


def test_views_are_written_in_place() -> None:
    batch = np.zeros((2, 29, 37, 3), np.uint8)
    for row, view in zip(batch, (GREY, COLOUR), strict=True):
        assert write_colour(view, row) is row
    np.testing.assert_array_equal(batch, np.stack([GREY_IN_COLOUR, COLOUR]))
