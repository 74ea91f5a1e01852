"""Images to read fast: photo-sized JPEGs and small PNGs, made from photographs and seeds, and packed.

The photographs lie inside scikit-learn (two) and, where it is installed, scikit-image (four). Each JPEG is a random
crop of one, resized to 500x375, under noise whose amplitude falls with frequency as in nature (1/f): such files hold as
many bytes as real photographs of that size, and bytes are what decoding costs.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from loader_rows import Kind
from PIL import Image

from orchestrate.data.index import MANIFEST_NAME, load_manifest
from orchestrate.data.pack import pack

Pixels = npt.NDArray[np.uint8]

WIDTH, HEIGHT, QUALITY = 500, 375, 95
SMALL_SIDE = 28
NUM_CLASSES = 10
# Noise of such standard deviations, grey levels, gives files of 97 KB in the mean, most of them 78 to 119 KB: what
# photographs of this size and quality have.
_NOISE_LEVELS = (4.0, 14.5)
_TILE = 1024


@dataclass(frozen=True)
class Images:
    """A packed set of images: `url` of the dataset, its tars in order, extension of the image members."""

    kind: Kind
    url: str
    tars: tuple[str, ...]
    extension: str


def build_images(folder: Path, kind: Kind, num_samples: int) -> Images:
    """Return a dataset of so many images, made now unless an earlier run left it in `folder`."""
    dest = folder / f"{kind}-{num_samples}-of-{len(photograph_names())}"
    extension = "jpg" if kind == "photos" else "png"
    if not (dest / MANIFEST_NAME).exists():
        source = folder / f"{dest.name}-files"
        _draw(source, kind, extension, num_samples)
        pack(str(source), str(dest), samples_per_shard=-(-num_samples // 8), workers=1)
        shutil.rmtree(source)
    tars = tuple(str(dest / shard.name) for shard in load_manifest(str(dest)).shards)
    return Images(kind, str(dest), tars, extension)


def _draw(folder: Path, kind: Kind, extension: str, num_samples: int) -> None:
    photographs, noise = _photographs(), _noise_tile()
    for number in range(num_samples):
        path = folder / f"class{number % NUM_CLASSES}" / f"{number:06d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        photo = photographs[int(random.integers(len(photographs)))]
        path.write_bytes(photo_jpeg(photo, noise, random) if kind == "photos" else small_png(photo, random))


def photo_jpeg(photo: Image.Image, noise: npt.NDArray[np.float32], random: np.random.Generator) -> bytes:
    """Make one JPEG of 500x375 pixels, 4:2:0."""
    image = _random_crop(photo, random, WIDTH / HEIGHT).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    top, left = random.integers(_TILE - HEIGHT), random.integers(_TILE - WIDTH)
    texture = noise[top : top + HEIGHT, left : left + WIDTH] * random.uniform(*_NOISE_LEVELS)
    pixels = np.clip(np.asarray(image) + texture, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def small_png(photo: Image.Image, random: np.random.Generator) -> bytes:
    """Make one grey PNG of 28x28 pixels."""
    image = _random_crop(photo, random, 1.0).convert("L").resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photograph_names() -> list[str]:
    """Name the photographs that images are made from: china and flower, and those of scikit-image that are there."""
    return ["china", "flower", *(path.stem for path in _scikit_image_files())]


def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    own = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return own + [Image.open(path).convert("RGB") for path in _scikit_image_files()]


def _scikit_image_files() -> list[Path]:
    """Find the photographs inside scikit-image's package; its functions would download those that are missing."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        return []
    folder = Path(package.origin).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return [folder / name for name in names if (folder / name).is_file()]


def _noise_tile() -> npt.NDArray[np.float32]:
    """Return (1024, 1024, 3) noise of mean 0 and standard deviation 1, amplitude 1 / frequency, that wraps around."""
    random = np.random.default_rng(0)
    white = np.fft.rfft2(random.standard_normal((3, _TILE, _TILE)))
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    noise = np.fft.irfft2(white / frequency, s=(_TILE, _TILE))
    noise[1:] = 0.8 * noise[0] + 0.2 * noise[1:]  # the channels of photographs go together
    scaled: npt.NDArray[np.float32] = (noise / noise.std(axis=(1, 2), keepdims=True)).astype(np.float32)
    return np.moveaxis(scaled, 0, 2)


def _random_crop(photo: Image.Image, random: np.random.Generator, ratio: float) -> Image.Image:
    """Cut a box of the given width / height, of 40 to 100 % of the greatest possible side; half are mirrored."""
    share = random.uniform(0.4, 1.0)
    height = int(share * min(photo.height, photo.width / ratio))
    width = int(height * ratio)
    left, top = int(random.integers(photo.width - width + 1)), int(random.integers(photo.height - height + 1))
    crop = photo.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
