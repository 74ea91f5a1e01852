from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from jaxtyping import UInt8
from PIL import Image
from torchvision.transforms import functional as torchvision

from ssl_methods.colour import Step
from ssl_methods.device_views import crop_views
from ssl_methods.pixels import Interpolation, flip, resize, solarise
from ssl_methods.view_plan import ViewSpec, plan_view
from ssl_methods.views import (
    Pixels,
    ViewRecipe,
    eval_view,
    make_views,
    normalise,
    recipe,
    recipe_names,
    view_arrays,
    view_sides,
)
from tests.ssl_methods.photos import COLOUR, GREY, GREY_IN_COLOUR, photo

WHOLE = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_p=0.0)
SQUARE = photo(16, 16)


def rate(spec: ViewSpec, *, changed_by: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]) -> float:
    """Return the share of 2000 views of a square image that equal `changed_by(image)`; the rest equal the image."""
    views = [
        make_views(SQUARE, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=sample_id)[0]
        for sample_id in range(2000)
    ]
    expected = changed_by(SQUARE)
    changed = [np.array_equal(view, expected) for view in views]
    assert all(done or np.array_equal(view, SQUARE) for done, view in zip(changed, views, strict=True))
    return sum(changed) / len(views)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_operations_happen_at_their_rates(probability: float) -> None:
    tolerance = 4 * (probability * (1 - probability) / 2000) ** 0.5  # four standard errors
    cases = {
        "flip_p": flip,
        "grayscale_p": in_grey,
        "solarise_p": solarise,
    }
    for name, operation in cases.items():
        spec = replace(WHOLE, **{name: probability})
        assert rate(spec, changed_by=operation) == pytest.approx(probability, abs=tolerance), name


def in_grey(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    luma = torch.from_numpy(image).to(torch.float32) @ torch.tensor([0.2989, 0.587, 0.114])
    return luma.round().to(torch.uint8)[..., None].expand(image.shape).numpy()


@pytest.mark.parametrize(("view", "blurred", "solarised"), [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_barlow_twins_views_differ_in_blur_and_solarisation(view: int, blurred: float, solarised: float) -> None:
    spec = replace(recipe("barlow_twins", 16).views[view], crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    plain = replace(spec, flip_p=0.0, jitter_p=0.0, grayscale_p=0.0)
    blur_only = ViewRecipe("test", (WHOLE,) * view + (replace(plain, solarise_p=0.0, blur_sigma=(2.0, 2.0)),), 16)
    changed = [
        not np.array_equal(make_views(SQUARE, blur_only, seed=1, epoch=0, sample_id=i)[view], SQUARE)
        for i in range(2000)
    ]
    assert float(np.mean(changed)) == pytest.approx(blurred, abs=0.027)  # four standard errors of 0.1
    rate_of_solarise = rate(replace(plain, blur_p=0.0), changed_by=solarise)
    assert rate_of_solarise == pytest.approx(solarised, abs=0.036)  # four standard errors of 0.2


def test_jitter_is_one_of_torchvisions_orders_and_strengths() -> None:
    spec = replace(WHOLE, jitter_p=1.0, brightness=0.4, contrast=0.4)
    first = []
    for sample_id in range(40):
        (view,) = make_views(SQUARE, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=sample_id)
        steps = plan_view(spec, (16, 16), seed=0, epoch=0, sample_id=sample_id, view=0).steps
        kinds, factors = zip(*drawn_jitter(sample_id), strict=True)
        assert tuple(step for step, _ in steps) == kinds
        assert [factor for _, factor in steps] == pytest.approx(factors)
        expected = torch.from_numpy(SQUARE).permute(2, 0, 1) / 255
        for step, factor in steps:
            adjust = torchvision.adjust_brightness if step is Step.BRIGHTNESS else torchvision.adjust_contrast
            expected = adjust(expected, factor)
            assert 0.6 <= factor <= 1.4
        differences = view - (expected * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(differences).max() <= 1  # a tie may be rounded the other way
        first.append(steps[0][0])
    assert min(first.count(Step.BRIGHTNESS), first.count(Step.CONTRAST)) > 8  # 20 expected; four standard errors below


def drawn_jitter(sample_id: int) -> list[tuple[Step, float]]:
    """The documented layout of a view's uniforms: 2 order, 3 brightness, 4 contrast."""
    from itertools import permutations

    from ssl_methods.randomness import uniforms

    draws = uniforms(0, epoch=0, sample_id=sample_id, view=0, count=5)
    amounts = {Step.BRIGHTNESS: 0.6 + 0.8 * draws[3], Step.CONTRAST: 0.6 + 0.8 * draws[4]}
    return [(Step(kind), amounts[Step(kind)]) for kind in list(permutations(range(4)))[int(draws[2] * 24)] if kind < 2]


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


@pytest.mark.parametrize("pixels", ["fast", "reference"])
@pytest.mark.parametrize("name", recipe_names())
def test_any_image_gives_uint8_views_in_three_channels(name: str, pixels: Pixels) -> None:
    chosen = recipe(name, 20)
    for shape in ((30, 40, 1), (30, 40, 3), (1, 1, 3), (1, 300, 1)):
        views = make_views(np.zeros(shape, np.uint8), chosen, seed=0, epoch=0, sample_id=0, pixels=pixels)
        assert [(view.shape, view.dtype.name) for view in views] == [((s, s, 3), "uint8") for s in view_sides(chosen)]
    assert eval_view(np.zeros((30, 40, 1), np.uint8), 20).shape == (20, 20, 3)


@pytest.mark.parametrize("name", recipe_names())
def test_grey_image_gives_the_views_of_its_three_equal_channels(name: str) -> None:
    for sample_id in range(20):
        grey = make_views(GREY, recipe(name, 24), seed=0, epoch=0, sample_id=sample_id)
        colour = make_views(GREY_IN_COLOUR, recipe(name, 24), seed=0, epoch=0, sample_id=sample_id)
        for one, other, spec in zip(grey, colour, recipe(name, 24).views, strict=True):
            # The blur's last float bit may decide a tie; solarisation then turns one level into one.
            assert np.abs(one.astype(int) - other).max() <= (1 if spec.blur_p else 0)


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
@pytest.mark.parametrize("name", recipe_names())
def test_fast_views_equal_torchvisions(name: str, size: tuple[int, int]) -> None:
    image, chosen = photo(*size), recipe(name, 64)
    for sample_id in range(10):
        fast, reference = (
            make_views(image, chosen, seed=0, epoch=0, sample_id=sample_id, pixels=pixels)
            for pixels in ("fast", "reference")
        )
        for view, other, spec in zip(fast, reference, chosen.views, strict=True):
            differences = np.abs(view.astype(int) - other)
            # Rounding: before and after the blur it is a level for a quarter of the pixels, else it is the resize's.
            assert differences.mean() < (0.3 if spec.blur_p else 0.03), sample_id


def test_views_are_written_into_rows_of_batches() -> None:
    chosen = recipe("small_dino", 28)
    batches = [np.zeros((3, side, side, 3), np.uint8) for side in view_sides(chosen)]
    for row, image in enumerate((COLOUR, GREY, GREY_IN_COLOUR)):
        out = [batch[row] for batch in batches]
        made = make_views(image, chosen, seed=0, epoch=0, sample_id=row, out=out)
        assert all(view is target for view, target in zip(made, out, strict=True))
        fresh = make_views(image, chosen, seed=0, epoch=0, sample_id=row)
        assert all(np.array_equal(view, batch[row]) for view, batch in zip(fresh, batches, strict=True))


def test_images_are_not_changed() -> None:
    for image in (COLOUR, GREY, SQUARE):
        before = image.copy()
        make_views(image, recipe("byol", 16), seed=0, epoch=0, sample_id=0)
        eval_view(image, 16)[:] = 0
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("dino", 224, [224] * 2 + [96] * 8),
        ("swav", 224, [224] * 2 + [96] * 6),
        ("small_dino", 28, [28, 28, 16, 16]),
    ],
)
def test_multi_crop_recipes_make_two_large_views_and_small_ones(name: str, size: int, sides: list[int]) -> None:
    chosen = recipe(name, size)
    views = make_views(COLOUR, chosen, seed=0, epoch=0, sample_id=0)
    assert [view.shape for view in views] == [(side, side, 3) for side in sides]
    assert list(view_sides(chosen)) == sides
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


def test_recipes_have_the_published_probabilities() -> None:
    """crop scale, interpolation, jitter, its strengths, grey, blur, solarisation."""
    byol = [((0.08, 1.0), "bicubic", 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, *rest) for rest in ((1.0, 0.0), (0.1, 0.2))]
    moco = ((0.2, 1.0), "bilinear", 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0)
    expected = {
        **dict.fromkeys(("barlow_twins", "byol", "vicreg", "triplet"), byol),
        **{name: [moco, moco] for name in ("moco_v2", "disco", "simsiam")},
        "s2_bnn": [((0.2, 1.0), "bilinear", 0.6, (0.4, 0.4, 0.4, 0.1), 0.2, 0.2, 0.0)] * 2,
        "simclr": [((0.08, 1.0), "bicubic", 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0)] * 2,
        "swav": [
            (scale, "bilinear", 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0)
            for scale in [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
        ],
        "supervised": [((0.08, 1.0), "bilinear", 0.0, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0, 0.0)],
    }
    assert {name: numbers(recipe(name, 224).views) for name in expected} == expected
    assert recipe("esvit", 224).views == recipe("dino", 224).views


def numbers(views: Sequence[ViewSpec]) -> list[tuple[object, ...]]:
    return [
        (
            each.crop_scale,
            each.interpolation,
            each.jitter_p,
            (each.brightness, each.contrast, each.saturation, each.hue),
            each.grayscale_p,
            each.blur_p,
            each.solarise_p,
        )
        for each in views
    ]


def test_small_crops_have_their_own_size() -> None:
    specs = (WHOLE, replace(WHOLE, size_factor=96 / 224))
    views = make_views(COLOUR, ViewRecipe("test", specs, 224), seed=0, epoch=0, sample_id=0)
    assert [view.shape for view in views] == [(224, 224, 3), (96, 96, 3)]


def test_crop_and_resize_equal_torchvision() -> None:
    image = photo(33, 33)
    interpolation: Interpolation
    for interpolation in ("bicubic", "bilinear"):
        spec = replace(WHOLE, interpolation=interpolation)
        (view,) = make_views(image, ViewRecipe("test", (spec,), 16), seed=0, epoch=0, sample_id=0)
        mode = torchvision.InterpolationMode(interpolation)
        expected = torchvision.resized_crop(Image.fromarray(image), 0, 0, 33, 33, [16, 16], mode)
        differences = np.abs(view.astype(int) - np.asarray(expected))
        assert differences.max() <= 1 and differences.mean() <= 0.03  # see test_pixels


@pytest.mark.parametrize("size", [(300, 500), (257, 256), (90, 61), (40, 200)])
def test_evaluation_view_equals_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = torchvision.center_crop(torchvision.resize(Image.fromarray(image), [64]), [56, 56])
    differences = np.abs(eval_view(image, 56).astype(int) - np.asarray(expected))
    assert differences.max() <= 1 and differences.mean() <= 0.03  # see test_pixels


@pytest.mark.parametrize("size", [(40, 320), (40, 1000), (1, 600), (600, 1), (64, 583), (583, 64)])
def test_evaluation_view_of_a_long_image_is_the_middle_of_the_resized_whole(size: tuple[int, int]) -> None:
    # Their long sides become whole numbers of pixels, so that nothing shifts.
    short, image = 64, photo(*size)
    whole = resize(image, tuple(short * side // min(size) for side in image.shape[:2]), "bilinear")
    top, left = (round((side - 56) / 2) for side in whole.shape[:2])
    np.testing.assert_array_equal(eval_view(image, 56), whole[top : top + 56, left : left + 56])


def test_evaluation_view_of_a_long_image_may_shift_by_half_a_pixel() -> None:
    columns = np.linspace(0, 250, 1001)  # a ramp: half a pixel of the view is 0.08 levels
    image = np.broadcast_to(columns[None, :, None], (41, 1001, 1)).astype(np.uint8)
    expected = torchvision.center_crop(torchvision.resize(Image.fromarray(image[:, :, 0]), [64]), [56, 56])
    assert np.abs(eval_view(image, 56)[:, :, 0].astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("shape", [(1, 10_000, 3), (10_000, 1, 3), (1, 60_000, 3)])
def test_evaluation_view_of_a_strip_takes_little_memory(shape: tuple[int, int, int]) -> None:
    image = np.zeros(shape, np.uint8)
    eval_view(SQUARE, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    eval_view(image, 224)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 100  # resized as a whole it takes gigabytes


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((40, 24, 3), np.uint8), r"writable uint8 of shape \(40, 24, 3\)"),
        (np.zeros((32, 32, 1), np.uint8), r"writable uint8 of shape \(32, 32, 1\)"),
        (np.zeros((32, 32), np.uint8), r"writable uint8 of shape \(32, 32\)"),
        (np.zeros((32, 32, 3), np.int8), r"writable int8 of shape \(32, 32, 3\)"),
        (np.zeros((32, 32, 3), np.float32), r"writable float32 of shape \(32, 32, 3\)"),
        (np.zeros((3, 32, 32), np.uint8).transpose(1, 2, 0), r"strides \(32, 1, 1024\)"),
        (np.zeros((32, 32, 3), np.uint8)[::-1], r"strides \(-96, 3, 1\)"),
        (np.broadcast_to(np.zeros(3, np.uint8), (32, 32, 3)), r"read-only uint8 of shape \(32, 32, 3\)"),
    ],
)
def test_arrays_that_views_cannot_be_written_to_are_named(array: npt.NDArray[np.generic], found: str) -> None:
    good = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=rf"out, view 1: .*{found}.* must be writable uint8 of shape \(32, 32, 3\)"):
        view_arrays((32, 32), [good, array])
    with pytest.raises(ValueError, match="out: 1 arrays for 2 views"):
        view_arrays((32, 32), [good])


def test_rows_of_batches_of_any_width_are_taken() -> None:
    batch = np.zeros((4, 32, 40, 3), np.uint8)
    for row in (batch[1, :, :32], batch[1, :, 3:35], np.zeros((64, 32, 3), np.uint8)[::2]):
        assert view_arrays((32,), [row])[0] is row


def test_views_are_not_written_into_arrays_of_another_size() -> None:
    wrong, chosen = [np.zeros((40, 40, 3), np.uint8)] * 2, recipe("byol", 32)
    message = r"out, view 0: writable uint8 of shape \(40, 40, 3\)"
    for pixels in ("fast", "reference"):
        with pytest.raises(ValueError, match=message):
            make_views(COLOUR, chosen, seed=0, epoch=0, sample_id=0, pixels=pixels, out=wrong)
    with pytest.raises(ValueError, match=message):
        crop_views(COLOUR, chosen, seed=0, epoch=0, sample_id=0, out=wrong)
    with pytest.raises(ValueError, match=message):
        eval_view(COLOUR, 32, out=wrong[0])


def test_images_of_four_channels_or_none_are_refused() -> None:
    for shape in ((30, 40, 4), (0, 40, 3)):
        image, where = np.zeros(shape, np.uint8), {"seed": 0, "epoch": 0, "sample_id": 0}
        for make in (make_views, crop_views):
            with pytest.raises(ValueError, match=r"image: uint8 of shape .* must be uint8 of shape"):
                make(image, recipe("byol", 32), **where)
        with pytest.raises(ValueError, match="image: uint8 of shape"):
            eval_view(image, 32)


def test_evaluation_view_of_the_right_size_is_the_image() -> None:
    row = np.zeros((16, 16, 3), np.uint8)
    assert eval_view(SQUARE, 16, out=row) is row
    np.testing.assert_array_equal(row, SQUARE)
    np.testing.assert_array_equal(eval_view(SQUARE[:, :, :1], 16), np.repeat(SQUARE[:, :, :1], 3, axis=2))


def test_normalised_batch_has_the_recipes_moments() -> None:
    chosen = recipe("supervised", 8)
    batch = torch.arange(2 * 8 * 8 * 3, dtype=torch.int32).remainder(256).to(torch.uint8).view(2, 8, 8, 3)
    result = normalise(batch, chosen)
    expected = torch.stack(
        [torchvision.normalize(image.permute(2, 0, 1) / 255, chosen.mean, chosen.std) for image in batch]
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)  # fp32, scaled by 255 in one step
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_unknown_recipe_and_impossible_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"view recipe 'simclr2': unknown; choose from barlow_twins, "):
        recipe("simclr2", 32)
    with pytest.raises(ValueError, match="view size 0: must be at least 1 pixel"):
        recipe("simclr", 0)
