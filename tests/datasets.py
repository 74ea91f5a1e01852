"""Synthetic datasets that a small network learns in seconds."""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from orchestrate.data.index import Manifest
from orchestrate.data.pack import pack

_KINDS = ("disc", "square", "triangle", "cross", "ring", "frame", "bar", "dots")


def make_shapes(
    dest: str | Path,
    num_samples: int,
    num_classes: int = 4,
    size: int = 28,
    seed: int = 0,
    samples_per_shard: int = 100,
    split: str = "train",
) -> Manifest:
    """Pack `num_samples` coloured shapes on noise; class = kind of shape, at random place, size and colour."""
    with tempfile.TemporaryDirectory() as folder:
        draw_shapes(Path(folder), num_samples, num_classes=num_classes, size=size, seed=seed)
        names = _KINDS[:num_classes]
        return pack(folder, str(dest), classes=names, samples_per_shard=samples_per_shard, split=split, workers=1)


def draw_shapes(folder: Path, num_samples: int, *, num_classes: int = 4, size: int = 28, seed: int = 0) -> None:
    """Write shapes as an image folder, one sub-folder a class; dates are fixed, so that packs are the same."""
    assert 1 <= num_classes <= len(_KINDS)
    random = np.random.default_rng(seed)
    for number in range(num_samples):
        kind = _KINDS[number % num_classes]
        path = folder / kind / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _shape(kind, size, random).save(path)
        os.utime(path, (0, 0))


def _shape(kind: str, size: int, random: np.random.Generator) -> Image.Image:
    image = Image.fromarray(random.integers(0, 80, (size, size, 3), dtype=np.uint8))
    radius = random.uniform(0.2, 0.32) * size
    x, y = random.uniform(radius, size - radius, 2)
    box, thin = (x - radius, y - radius, x + radius, y + radius), radius / 3
    color = tuple(int(level) for level in random.integers(130, 256, 3))
    draw = ImageDraw.Draw(image)
    if kind in ("disc", "ring"):
        draw.ellipse(box, outline=color, fill=color if kind == "disc" else None, width=2)
    elif kind in ("square", "frame"):
        draw.rectangle(box, outline=color, fill=color if kind == "square" else None, width=2)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    elif kind == "dots":
        for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
            cx, cy = x + dx * radius * 0.7, y + dy * radius * 0.7
            draw.ellipse((cx - thin, cy - thin, cx + thin, cy + thin), fill=color)
    else:
        draw.rectangle((x - radius, y - thin, x + radius, y + thin), fill=color)
        if kind == "cross":
            draw.rectangle((x - thin, y - radius, x + thin, y + radius), fill=color)
    return image
