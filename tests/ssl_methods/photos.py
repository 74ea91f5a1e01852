"""Images that tests of views share."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def photo(width: int = 37, height: int = 29) -> UInt8[np.ndarray, "height width 3"]:
    """Smooth colour waves with noise: all levels, all hues."""
    y, x, channel = np.mgrid[:height, :width, :3]
    waves = 127 + 110 * np.sin(0.31 * x + 0.17 * y * (channel + 1) + channel)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return (waves + noise).clip(0, 255).astype(np.uint8)


COLOUR = photo()
GREY = COLOUR[:, :, 1:2].copy()
GREY_IN_COLOUR = np.repeat(GREY, 3, axis=2)
