from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from ssl_methods.views import ViewRecipe, ViewSpec, eval_view, make_views, normalise, recipe, recipe_names
from tests.ssl_methods.test_pixels import COLOUR, GREY, GREY_IN_COLOUR, photo

WHOLE = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_p=0.0)
SQUARE = photo(16, 16)


def rate(spec: ViewSpec, *, changed_by: Any) -> float:
    """Return the share of 2000 views of a square image that equal `changed_by(image)`; the rest equal the image."""
    views = [
        make_views(SQUARE, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=sample_id)[0]
        for sample_id in range(2000)
    ]
    expected, original = np.asarray(changed_by(SQUARE)), np.asarray(SQUARE)
    changed = [np.array_equal(view, expected) for view in views]
    assert all(done or np.array_equal(view, original) for done, view in zip(changed, views, strict=True))
    return sum(changed) / len(views)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_operations_happen_at_their_rates(probability: float) -> None:
    tolerance = 4 * (probability * (1 - probability) / 2000) ** 0.5  # four standard errors
    cases = {
        "flip_p": lambda image: reference.hflip(image),
        "grayscale_p": lambda image: reference.to_grayscale(image, 3),
        "solarise_p": lambda image: reference.solarize(image, 128),
    }
    for name, operation in cases.items():
        spec = replace(WHOLE, **{name: probability})
        assert rate(spec, changed_by=operation) == pytest.approx(probability, abs=tolerance), name


@pytest.mark.parametrize(("view", "blurred", "solarised"), [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_barlow_twins_views_differ_in_blur_and_solarisation(view: int, blurred: float, solarised: float) -> None:
    spec = replace(recipe("barlow_twins", 16).views[view], crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    plain = replace(spec, flip_p=0.0, jitter_p=0.0, grayscale_p=0.0)
    blur_only = ViewRecipe("test", (WHOLE,) * view + (replace(plain, solarise_p=0.0, blur_sigma=(2.0, 2.0)),), 16)
    changed = [
        not np.array_equal(make_views(SQUARE, blur_only, seed=1, epoch=0, sample_id=i)[view], np.asarray(SQUARE))
        for i in range(2000)
    ]
    assert float(np.mean(changed)) == pytest.approx(blurred, abs=0.027)  # four standard errors of 0.1
    rate_of_solarise = rate(replace(plain, blur_p=0.0), changed_by=lambda image: reference.solarize(image, 128))
    assert rate_of_solarise == pytest.approx(solarised, abs=0.036)  # four standard errors of 0.2


def test_jitter_is_one_of_torchvisions_orders_and_strengths() -> None:
    spec = replace(WHOLE, jitter_p=1.0, brightness=0.4, contrast=0.4)
    ranges = {"brightness first": 0, "contrast first": 0}
    for sample_id in range(40):
        view = make_views(SQUARE, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=sample_id)[0]
        brightness, contrast, order = drawn_jitter(sample_id)
        first = reference.adjust_contrast(reference.adjust_brightness(SQUARE, brightness), contrast)
        second = reference.adjust_brightness(reference.adjust_contrast(SQUARE, contrast), brightness)
        expected, name = (first, "brightness first") if order else (second, "contrast first")
        assert np.array_equal(view, np.asarray(expected))
        assert 0.6 <= min(brightness, contrast) <= max(brightness, contrast) <= 1.4
        ranges[name] += 1
    assert min(ranges.values()) > 8  # each order has probability 1/2; 8 of 40 is four standard errors below


def drawn_jitter(sample_id: int) -> tuple[float, float, bool]:
    """The documented layout of a view's uniforms: 2 order, 3 brightness, 4 contrast."""
    from itertools import permutations

    from ssl_methods.randomness import uniforms

    draws = uniforms(0, epoch=0, sample_id=sample_id, view=0, count=5)
    order = list(permutations(range(4)))[int(draws[2] * 24)]
    return 0.6 + 0.8 * draws[3], 0.6 + 0.8 * draws[4], order.index(0) < order.index(1)


@pytest.mark.parametrize("name", recipe_names())
def test_views_depend_on_their_key_alone(name: str) -> None:
    chosen = recipe(name, 16)
    keys = [(seed, epoch, sample_id) for seed in (0, 7) for epoch in (0, 3) for sample_id in (0, 2**40)]

    def made(key: tuple[int, int, int]) -> list[bytes]:
        seed, epoch, sample_id = key
        return [view.tobytes() for view in make_views(COLOUR, chosen, seed=seed, epoch=epoch, sample_id=sample_id)]

    forwards, backwards = {key: made(key) for key in keys}, {key: made(key) for key in reversed(keys)}
    assert forwards == backwards
    distinct = {view for views in forwards.values() for view in views}
    assert len(distinct) == len(keys) * len(chosen.views)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_image_gives_uint8_views_in_three_channels(name: str, mode: str) -> None:
    image = Image.new(mode, (40, 30))
    chosen = recipe(name, 20)
    for view, spec in zip(make_views(image, chosen, seed=0, epoch=0, sample_id=0), chosen.views, strict=True):
        side = round(20 * spec.size_factor)
        assert (view.shape, view.dtype) == ((side, side, 3), np.uint8)
    assert eval_view(image, 20).shape == (20, 20, 3)


@pytest.mark.parametrize("name", recipe_names())
def test_grey_image_gives_the_views_of_its_three_equal_channels(name: str) -> None:
    for sample_id in range(20):
        grey = make_views(GREY, recipe(name, 24), seed=0, epoch=0, sample_id=sample_id)
        colour = make_views(GREY_IN_COLOUR, recipe(name, 24), seed=0, epoch=0, sample_id=sample_id)
        assert all(np.array_equal(one, other) for one, other in zip(grey, colour, strict=True))


@pytest.mark.parametrize(
    ("name", "size", "sides"), [("dino", 224, [224] * 2 + [96] * 8), ("small_dino", 28, [28, 28, 16, 16])]
)
def test_multi_crop_recipes_make_two_large_views_and_small_ones(name: str, size: int, sides: list[int]) -> None:
    chosen = recipe(name, size)
    views = make_views(COLOUR, chosen, seed=0, epoch=0, sample_id=0)
    assert [view.shape for view in views] == [(side, side, 3) for side in sides]
    large, small = chosen.views[0], chosen.views[-1]
    assert large.crop_scale[0] >= small.crop_scale[1]
    assert all(side >= 12 for side in sides)


def test_dino_views_have_the_published_probabilities() -> None:
    first, second, *small = recipe("dino", 224).views
    assert [(each.blur_p, each.solarise_p, each.crop_scale) for each in (first, second, small[0])] == [
        (1.0, 0.0, (0.4, 1.0)),
        (0.1, 0.2, (0.4, 1.0)),
        (0.5, 0.0, (0.05, 0.4)),
    ]
    assert len(small) == 8 and len(set(small)) == 1
    for each in (first, second, small[0]):
        assert (each.flip_p, each.jitter_p, each.grayscale_p, each.interpolation) == (0.5, 0.8, 0.2, "bicubic")
        assert (each.brightness, each.contrast, each.saturation, each.hue) == (0.4, 0.4, 0.2, 0.1)


def test_small_crops_have_their_own_size() -> None:
    specs = (WHOLE, replace(WHOLE, size_factor=96 / 224))
    views = make_views(COLOUR, ViewRecipe("test", specs, 224), seed=0, epoch=0, sample_id=0)
    assert [view.shape for view in views] == [(224, 224, 3), (96, 96, 3)]


def test_crop_and_resize_equal_torchvision() -> None:
    for interpolation, theirs in (("bicubic", "BICUBIC"), ("bilinear", "BILINEAR")):
        spec = replace(WHOLE, interpolation=interpolation)
        image = photo(33, 33)
        view = make_views(image, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=0)[0]
        mode = reference.InterpolationMode[theirs]
        assert np.array_equal(view, np.asarray(reference.resized_crop(image, 0, 0, 33, 33, [16, 16], mode)))


@pytest.mark.parametrize("size", [(300, 500), (257, 256), (90, 61), (40, 200)])
def test_evaluation_view_equals_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = reference.center_crop(reference.resize(image, [64]), [56, 56])
    assert np.array_equal(eval_view(image, 56), np.asarray(expected))


def test_evaluation_view_of_the_right_size_is_the_image() -> None:
    assert np.array_equal(eval_view(SQUARE, 16), np.asarray(SQUARE))


def test_normalised_batch_has_the_recipes_moments() -> None:
    chosen = recipe("supervised", 8)
    batch = torch.arange(2 * 8 * 8 * 3, dtype=torch.int32).remainder(256).to(torch.uint8).view(2, 8, 8, 3)
    result = normalise(batch, chosen)
    expected = torch.stack(
        [reference.normalize(image.permute(2, 0, 1) / 255, chosen.mean, chosen.std) for image in batch]
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)  # fp32, scaled by 255 in one step
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_unknown_recipe_and_impossible_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"view recipe 'simclr2': unknown; choose from barlow_twins, "):
        recipe("simclr2", 32)
    with pytest.raises(ValueError, match="view size 0: must be at least 1 pixel"):
        recipe("simclr", 0)
