"""The colour pass against torchvision's functions on float images, and C against numpy to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import UInt8
from torchvision.transforms.v2 import functional as torchvision

from ssl_methods.colour import Step, c_is_built, recolour, recolour_in_c, recolour_in_numpy
from tests.ssl_methods.photos import COLOUR, GREY, GREY_IN_COLOUR

PACKAGE = Path(__file__).parents[2] / "ssl_methods"
CUBE = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), axis=-1).reshape(52, -1, 3).astype(np.uint8)
FACTORS = st.floats(0, 2)
STEPS = st.permutations(
    [(Step.BRIGHTNESS, FACTORS), (Step.CONTRAST, FACTORS), (Step.SATURATION, FACTORS), (Step.HUE, st.floats(-0.5, 0.5))]
).flatmap(
    lambda order: st.integers(0, 4).flatmap(lambda n: st.tuples(*[st.tuples(st.just(s), a) for s, a in order[:n]]))
)
ADJUSTMENTS = {
    Step.BRIGHTNESS: torchvision.adjust_brightness,
    Step.CONTRAST: torchvision.adjust_contrast,
    Step.SATURATION: torchvision.adjust_saturation,
    Step.HUE: torchvision.adjust_hue,
}


def expected(
    view: UInt8[np.ndarray, "height width channels"], steps: Sequence[tuple[Step, float]], *, grey: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
    """The same in torchvision on float32, rounded once."""
    levels = torch.from_numpy(np.broadcast_to(view, (*view.shape[:2], 3)).copy()).permute(2, 0, 1) / 255
    for step, amount in steps:
        levels = ADJUSTMENTS[step](levels, amount)
    if grey:
        levels = torchvision.rgb_to_grayscale(levels, num_output_channels=3)
    return (levels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def difference(actual: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.maximum(actual, other) - np.minimum(actual, other)


@pytest.mark.parametrize("image", [COLOUR, CUBE], ids=["photo", "cube"])
@pytest.mark.parametrize(
    ("step", "amounts"),
    [(step, [0.0, 0.6, 1.0, 1.37, 2.0]) for step in Step if step is not Step.HUE]
    + [(Step.HUE, [-0.5, -0.1, -0.001, 0.0, 0.07, 0.5])],
)
def test_each_step_equals_torchvision_within_a_level(
    image: UInt8[np.ndarray, "height width 3"], step: Step, amounts: list[float]
) -> None:
    for amount in amounts:
        differences = difference(recolour(image, [(step, amount)]), expected(image, [(step, amount)]))
        # Float sums in another order turn a tie the other way: one level, and rarely.
        assert differences.max() <= 1 and differences.mean() < 0.02, amount


def test_every_order_equals_torchvision_within_a_level() -> None:
    steps = [(Step.BRIGHTNESS, 1.35), (Step.CONTRAST, 0.7), (Step.SATURATION, 1.2), (Step.HUE, 0.08)]
    results = set()
    for order in permutations(steps):
        for grey in (False, True):
            view = np.repeat(recolour(COLOUR, order, grey=grey), 3 if grey else 1, axis=2)
            differences = difference(view, expected(COLOUR, order, grey=grey))
            assert differences.max() <= 1 and differences.mean() < 0.003
        results.add(recolour(COLOUR, order).tobytes())
    assert len(results) >= 12  # the order matters


@settings(max_examples=200, deadline=None)
@given(
    steps=STEPS,
    grey=st.booleans(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
    seed=st.integers(0, 2**32 - 1),
)
def test_c_gives_the_bits_of_numpy_on_every_processor(
    steps: Sequence[tuple[Step, float]], grey: bool, shape: tuple[int, int, int], seed: int
) -> None:
    view = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    numpys = recolour_in_numpy(view, steps, grey=grey)
    for bits in (128, 256, 512):
        np.testing.assert_array_equal(recolour_in_c(view, steps, grey=grey, widest_vector_bits=bits), numpys)


def test_c_gives_the_bits_of_numpy_on_photo_sized_views() -> None:
    view = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    for steps in permutations(
        [(Step.BRIGHTNESS, 0.63), (Step.CONTRAST, 1.39), (Step.SATURATION, 0.8), (Step.HUE, -0.1)]
    ):
        np.testing.assert_array_equal(recolour_in_c(view, steps), recolour_in_numpy(view, steps))


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, grey=st.booleans())
def test_one_channel_gives_what_three_equal_ones_give(steps: Sequence[tuple[Step, float]], grey: bool) -> None:
    one, three = recolour(GREY, steps, grey=grey), recolour(GREY_IN_COLOUR, steps, grey=grey)
    assert one.shape[2] == 1
    np.testing.assert_array_equal(np.broadcast_to(one, three.shape), three)


def test_nothing_to_do_gives_a_copy() -> None:
    for function in (recolour_in_c, recolour_in_numpy):
        copied = function(COLOUR, ())
        np.testing.assert_array_equal(copied, COLOUR)
        assert not np.shares_memory(copied, COLOUR)


def test_views_need_not_be_contiguous() -> None:
    steps = [(Step.SATURATION, 1.4)]
    np.testing.assert_array_equal(recolour(COLOUR[3:20, 5:], steps), recolour(COLOUR[3:20, 5:].copy(), steps))


def test_package_without_the_c_routine_gives_the_same_views_and_says_so_once(tmp_path: Path) -> None:
    assert c_is_built()
    copied = shutil.copytree(PACKAGE, tmp_path / "ssl_methods", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import hashlib, numpy, ssl_methods
from ssl_methods.views import make_views, recipe
image = numpy.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=numpy.uint8)
views = [view for i in range(20) for view in make_views(image, recipe("byol", 32), seed=0, epoch=0, sample_id=i)]
print(ssl_methods.__path__[0], hashlib.sha256(b"".join(view.tobytes() for view in views)).hexdigest())
"""
    (folder, digest, stderr), (other_folder, same_digest, quiet) = (
        run_program(program, path) for path in (tmp_path, PACKAGE.parent)
    )
    assert (folder, other_folder) == (str(copied), str(PACKAGE))
    assert digest == same_digest
    assert stderr.count("Install a C compiler (gcc)") == 1
    assert "compiler" not in quiet


def run_program(program: str, path: Path) -> tuple[str, str, str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=path, capture_output=True, text=True, check=True
    )
    folder, digest = result.stdout.split()
    return folder, digest, result.stderr


def test_c_never_reads_floats_as_bytes() -> None:
    unchecked = getattr(recolour_in_c, "__wrapped__", recolour_in_c)  # tests verify annotations, production does not
    for view in (np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"view: .* must be uint8 with 1 or 3 channels"):
            unchecked(view, [(Step.BRIGHTNESS, 1.0)])
