"""What a dataset looks like: counts, sizes, class balance, how well its order mixes, a sheet of images and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from orchestrate.data.order import Order
from orchestrate.data.reader import DamagedSampleError, Reader
from orchestrate.data.shuffle_quality import Labels, ShuffleQuality, sampled_steps, shuffle_quality
from orchestrate.errors import ConfigError, DataError
from ssl_methods.views import ViewRecipe, make_views, recipe, view_sides

Image = UInt8[np.ndarray, "h w c"]
Found = TypeVar("Found")

_LOOKED_AT = 64  # samples that are decoded for their sizes
_READ_WHOLE = 200_000  # samples of local data whose labels are all read: seconds
_LOCAL_BATCHES, _REMOTE_BATCHES = 16, 2  # otherwise: one request for each sample of so many batches
_READERS = 32  # requests at a time
_CLASSES_SHOWN = 20  # by name: all, or the most and the least frequent
_BAR = 30  # characters
_GAP, _PAPER = 4, 255  # between the images of a sheet: pixels, and grey level


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    Attributes:
        num_bytes: of all shards.
        samples_per_shard: fewest and most.
        image_sizes: (width, height) of some samples, sorted by area.
        classes: names.
        class_counts: samples of each class; empty where that is not known.
        labels_read: samples whose labels the counts were taken from; 0 if the manifest says them.
        damaged: samples that could not be read or decoded, of those that were looked at.
        global_batch: that `quality` is about.
        quality: None for unlabelled data.
    """

    url: str
    split: str
    digest: str
    num_samples: int
    num_shards: int
    num_bytes: int
    samples_per_shard: tuple[int, int]
    image_sizes: tuple[tuple[int, int], ...]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    labels_read: int
    damaged: int
    global_batch: int
    quality: ShuffleQuality | None

    def as_text(self) -> str:
        """Write it for people."""
        parts = {
            "samples": [_counts_text(self)],
            "bytes": [f"{_bytes_text(self.num_bytes)}, {_bytes_text(self.num_bytes / self.num_samples)} a sample"],
            "images": [_sizes_text(self.image_sizes)],
            "classes": _classes_text(self),
            "mixing": _mixing_text(self),
            "damaged": [f"{self.damaged} of the samples looked at; `orchestrate data verify --decode` names all"],
        }
        shown = {name: lines for name, lines in parts.items() if name != "damaged" or self.damaged}
        rows = [f"{self.url}: split {self.split}, digest {self.digest[:16]}"]
        for name, lines in shown.items():
            rows += [f"  {name if number == 0 else '':9}{line}" for number, line in enumerate(lines)]
        return "\n".join(rows)


def describe(url: str, *, global_batch: int, seed: int = 0) -> Description:
    """Look at a dataset: the manifest, some images, and the labels of some batches in the order of a training.

    Raises:
        StorageError: the store does not answer.
        DataError: the dataset is missing or incomplete.
    """
    reader = Reader(url)
    manifest, order = reader.manifest, Order(reader.num_samples, seed, global_batch=global_batch)
    labels = _read_labels(reader, _ids_to_label(reader, order) if reader.has_labels else [])
    counts = _counts(reader, labels)
    sizes = _image_sizes(reader, _spread(reader.num_samples, _LOOKED_AT))
    samples = [shard.samples for shard in manifest.shards]
    return Description(
        url=url,
        split=manifest.split,
        digest=manifest.digest,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.bytes for shard in manifest.shards),
        samples_per_shard=(min(samples), max(samples)),
        image_sizes=tuple(sorted((size for size in sizes.values() if size), key=lambda size: size[0] * size[1])),
        classes=manifest.classes,
        class_counts=tuple(counts.tolist()),
        labels_read=0 if "class_counts" in manifest.info else labels.num_known,
        damaged=len(labels.damaged | {sample_id for sample_id, size in sizes.items() if size is None}),
        global_batch=global_batch,
        quality=_quality(reader, order, labels, counts) if counts.any() else None,
    )


def contact_sheet(
    url: str, views: ViewRecipe, *, num_samples: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw samples as rows: the image as it is, scaled to the largest view, then the views of epoch 0.

    Samples are spread evenly over the dataset. A damaged one is left out.

    Raises:
        StorageError: the store does not answer.
        DataError: the dataset is missing or incomplete, or none of the samples can be decoded.
    """
    reader, side = Reader(url), max(view_sides(views))
    rows: list[Sequence[Image]] = []
    ids = _spread(reader.num_samples, num_samples)
    for sample_id, image in _looked_at(reader, ids, lambda chosen: _decoded(reader, chosen)).items():
        if image is not None:
            made = make_views(image, views, seed=seed, epoch=0, sample_id=sample_id)
            rows.append([_fitted(image, side), *made])
    if not rows:
        raise DataError(f"{url}: none of the samples that were tried can be decoded; run `orchestrate data verify`")
    return _sheet(rows, side)


def write_sheet(path: Path, url: str, recipe_name: str, *, size: int, num_samples: int, seed: int = 0) -> None:
    """Write a contact sheet as an image file; the suffix chooses its format.

    Raises:
        ConfigError: no such recipe, or the file cannot be written.
        StorageError, DataError: see `contact_sheet`.
    """
    from PIL import Image as Pillow

    try:
        views = recipe(recipe_name, size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sheet = contact_sheet(url, views, num_samples=num_samples, seed=seed)
    try:
        Pillow.fromarray(sheet).save(path)
    except (OSError, ValueError) as error:  # a suffix that names no format is a ValueError
        raise ConfigError(f"{path}: cannot be written: {error}; name a .png file in a folder that exists") from error


class _Labels:
    """Labels of the samples that were read, by id; -1 for damaged ones."""

    def __init__(self, known: Mapping[int, int]) -> None:
        self._ids = np.array(sorted(known), dtype=np.int64)
        self._labels = np.array([known[sample_id] for sample_id in self._ids.tolist()], dtype=np.int64)
        self.damaged = frozenset(self._ids[self._labels < 0].tolist())
        self.num_known = len(self._ids) - len(self.damaged)

    def of(self, ids: npt.NDArray[np.int64]) -> Labels:
        found: Labels = self._labels[np.searchsorted(self._ids, ids)]
        return found

    def counts(self, num_classes: int) -> Labels:
        return np.bincount(self._labels[self._labels >= 0], minlength=num_classes)


def _num_batches(reader: Reader) -> int:
    if reader.is_remote:
        return _REMOTE_BATCHES
    return reader.num_samples if reader.num_samples <= _READ_WHOLE else _LOCAL_BATCHES


def _ids_to_label(reader: Reader, order: Order) -> list[int]:
    if not reader.is_remote and reader.num_samples <= _READ_WHOLE:
        return list(range(reader.num_samples))
    ids = [order.batch(step)[0] for step in sampled_steps(order, _num_batches(reader))]
    return [int(sample_id) for sample_id in np.unique(np.concatenate(ids))]


def _read_labels(reader: Reader, ids: Sequence[int]) -> _Labels:
    found = _looked_at(reader, ids, lambda sample_id: reader.read(sample_id).label)
    return _Labels({sample_id: -1 if label is None else label for sample_id, label in found.items()})


def _counts(reader: Reader, labels: _Labels) -> Labels:
    stated = reader.manifest.info.get("class_counts")
    return np.array(stated, dtype=np.int64) if stated else labels.counts(reader.manifest.num_classes)


def _quality(reader: Reader, order: Order, labels: _Labels, counts: Labels) -> ShuffleQuality:
    return shuffle_quality(order, labels.of, class_counts=counts, num_batches=_num_batches(reader))


def _image_sizes(reader: Reader, ids: Sequence[int]) -> dict[int, tuple[int, int] | None]:
    """Decode samples for their (width, height)."""

    def size(sample_id: int) -> tuple[int, int]:
        height, width, _ = _decoded(reader, sample_id).shape
        return width, height

    return _looked_at(reader, ids, size)


def _decoded(reader: Reader, sample_id: int) -> Image:
    return reader.decode(reader.place(sample_id), reader.read(sample_id))


def _looked_at(reader: Reader, ids: Sequence[int], look: Callable[[int], Found]) -> dict[int, Found | None]:
    """Look at samples, many at a time where each is a request to a store; None for damaged ones."""

    def look_if_whole(sample_id: int) -> Found | None:
        try:
            return look(sample_id)
        except DamagedSampleError:
            return None

    with ThreadPoolExecutor(_READERS if reader.is_remote else 1) as pool:
        return dict(zip(ids, pool.map(look_if_whole, ids), strict=True))


def _spread(num_samples: int, wanted: int) -> list[int]:
    """Choose so many ids evenly, or all."""
    return sorted({number * num_samples // wanted for number in range(wanted)})


def _fitted(image: Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Scale an image to fit a square, in the middle of paper."""
    from PIL import Image as Pillow

    height, width, _ = image.shape
    scale = side / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = Pillow.fromarray(image.squeeze()).convert("RGB").resize((new_width, new_height), Pillow.Resampling.BICUBIC)
    square = np.full((side, side, 3), _PAPER, dtype=np.uint8)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    square[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    return square


def _sheet(rows: Sequence[Sequence[Image]], side: int) -> UInt8[np.ndarray, "height width 3"]:
    """Lay rows of square images under each other; smaller views keep their size."""
    pitch, widths = side + _GAP, [image.shape[1] + _GAP for image in rows[0]]
    sheet = np.full((len(rows) * pitch + _GAP, sum(widths) + _GAP, 3), _PAPER, dtype=np.uint8)
    for row, images in enumerate(rows):
        left = _GAP
        for image, width in zip(images, widths, strict=True):
            top = _GAP + row * pitch
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
            left += width
    return sheet


def _counts_text(found: Description) -> str:
    fewest, most = found.samples_per_shard
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{found.num_samples:,} in {found.num_shards:,} shards of {each}"


def _bytes_text(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _sizes_text(sizes: Sequence[tuple[int, int]]) -> str:
    if not sizes:
        return "none could be decoded"
    smallest, median, largest = (
        f"{width} x {height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    )
    if smallest == largest:
        return f"{median} pixels, {len(sizes)} looked at"
    return f"{median} pixels (median of {len(sizes)}), {smallest} to {largest}"


def _classes_text(found: Description) -> list[str]:
    """Say how many samples the classes have, then draw a bar for each, or for the ends of a long list."""
    counts = np.array(found.class_counts, dtype=np.int64)
    if not counts.any():
        return ["none: the samples have no labels"]
    source = "" if not found.labels_read else f", from the labels of {found.labels_read:,} samples"
    spread = f"{counts.min():,} to {counts.max():,} samples, median {int(np.median(counts)):,}"
    if counts.min() == counts.max():
        spread = f"{counts.max():,} samples each"
    shown, names = np.argsort(-counts, kind="stable"), found.classes
    half = _CLASSES_SHOWN // 2
    ends = [shown] if len(shown) <= _CLASSES_SHOWN else [shown[:half], shown[-half:]]
    width = min(40, max(len(names[number]) for end in ends for number in end))
    bars = [
        [f"{names[n][:40]:{width}} {counts[n]:10,} {'#' * _bar(counts[n], counts.max())}" for n in end] for end in ends
    ]
    rest = [] if len(ends) == 1 else [f"... {len(shown) - 2 * half:,} more ...", *bars[1]]
    return [f"{len(names):,} of {spread}{source}", *bars[0], *rest]


def _bar(count: int, most: int) -> int:
    return max(int(count > 0), round(_BAR * count / most))


def _mixing_text(found: Description) -> list[str]:
    quality = found.quality
    if quality is None:
        return ["not known without labels"]
    share = "all" if quality.is_whole_epoch else "a sample of"
    lines = [
        f"{quality.classes:.1f} classes in a batch of {found.global_batch:,}, fewest {quality.fewest_classes:,}; a "
        f"permutation of all samples gives {quality.expected_classes:.1f}",
        f"distance from the classes of all samples {quality.distance:.3f}; a permutation gives "
        f"{quality.expected_distance:.3f}",
        f"means over {share} {quality.num_batches:,} global batches of an epoch",
    ]
    if quality.is_low:
        lines.append(
            "warning: neighbours in the shards are of one class, and so are batches; shuffle once with "
            "`orchestrate data pack`, or train with a larger global batch"
        )
    return lines
