"""A user's own transform: what it may return, and what is refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from orchestrate.data.images import decode
from orchestrate.data.view_maker import Job, Maker, Pixels, Rows, load_transform
from orchestrate.errors import ConfigError
from ssl_methods.views import make_views, recipe

RECIPE = recipe("barlow_twins", 32)
Draw = Callable[[int], list[float]]


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def made(transform: str, pixels: Pixels = "fast") -> list[UInt8[np.ndarray, "side side 3"]]:
    maker = Maker(RECIPE, seed=0, pixels=pixels, transform=f"{__name__}:{transform}")
    rows = Rows.allocate(maker, 2)
    assert maker.make([Job(1, png(), 0, 5)], rows) == []
    return [view[1].numpy() for view in rows.views]


def as_floats(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels / np.float32(255)


def as_shorts(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels.astype(np.int16)


def without_channels(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels[:, :, 0]


def with_alpha(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return np.concatenate([pixels, pixels[:, :, :1]], axis=2)


def empty(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels[:0]


def nothing(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return None


def mirrored(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels[:, ::-1]


def in_other_channel_order(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels[:, :, ::-1]


def one_channel(pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
    return pixels[:, :, 1:2]


class Stain:
    def __call__(self, pixels: UInt8[np.ndarray, "h w c"], *, draw: Draw) -> object:
        return pixels


@pytest.mark.parametrize("pixels", ["fast", "reference", "device"])
@pytest.mark.parametrize(
    ("transform", "found"),
    [
        ("as_floats", r"float32 of shape \(48, 40, 3\)"),
        ("as_shorts", r"int16 of shape \(48, 40, 3\)"),
        ("without_channels", r"uint8 of shape \(48, 40\)"),
        ("with_alpha", r"uint8 of shape \(48, 40, 4\)"),
        ("empty", r"uint8 of shape \(0, 40, 3\)"),
        ("nothing", "NoneType"),
    ],
)
def test_a_transform_that_returns_no_image_is_named(transform: str, found: str, pixels: Pixels) -> None:
    message = rf"views.transform: {__name__}:{transform}: returned {found}, must return a uint8 array of shape "
    with pytest.raises(ConfigError, match=message):
        made(transform, pixels)


@pytest.mark.parametrize("pixels", ["fast", "reference", "device"])
@pytest.mark.parametrize("transform", ["mirrored", "in_other_channel_order", "one_channel"])
def test_a_transform_may_return_any_memory_layout(transform: str, pixels: Pixels) -> None:
    image = globals()[transform](decode(png()), draw=lambda count: [0.0] * count)
    views = made(transform, pixels)
    if pixels != "device":
        expected = make_views(np.ascontiguousarray(image), RECIPE, seed=0, epoch=0, sample_id=5, pixels=pixels)
        for view, other in zip(views, expected, strict=True):
            np.testing.assert_array_equal(view, other)


@pytest.mark.parametrize(("name", "kind"), [("RECIPE", "of type ViewRecipe"), ("Stain", "a class")])
def test_a_transform_that_is_no_function_is_refused_when_it_is_loaded(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"views.transform: {__name__}:{name}: is {kind}, must be a function"):
        load_transform(f"{__name__}:{name}")
