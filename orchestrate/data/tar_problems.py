"""What can be wrong with shards and samples, and how it is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Extensions of images, as `data.images.SUFFIXES`; that module imports an image library.
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff"})
LABEL_EXTENSION = "cls"
# Noted of every sample without one; a problem only where others have labels.
NO_LABEL = "no label"
BAD_LABEL = "label is no whole number"
# Kinds of samples that training cannot use, whether there are labels or not.
NO_IMAGE, TWO_IMAGES, EMPTY_IMAGE = "no image", "more than one image", "empty image"
UNUSABLE = frozenset({NO_IMAGE, TWO_IMAGES, EMPTY_IMAGE})
SPLIT = "split sample"
DUPLICATE = "duplicate key"
# Labels are numbers from 0; a larger one is an identifier, or damage, and would make a list of as many classes.
MOST_CLASSES = 1_000_000
REPACK = "repack it with `orchestrate data pack`, which puts the members together"
UNPACK = "decompress it, or give it the ending .tar.gz, .tar.bz2 or .tar.xz and repack it with `orchestrate data pack`"
_LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
_FIRST_DOT = (
    ": a key ends at the first dot of a name, so two images may have become one sample; rename it, or ignore this if "
    "it belongs to the sample"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong where; what cannot be told is "", and `sample` counts from 0 in its shard, -1 for the shard."""

    shard: str
    sample: int
    key: str
    member: str
    reason: str

    def __str__(self) -> str:
        """Name the place, then the reason."""
        parts = [f"sample {self.sample}"] * (self.sample >= 0) + [f"key {self.key!r}"] * bool(self.key)
        parts += [f"member {self.member!r}"] * bool(self.member)
        place = ", ".join(parts)
        text = f"{self.shard}: {place}: {self.reason}" if place else f"{self.shard}: {self.reason}"
        # Names in a tar need not be UTF-8; the message must be, to be printed.
        return text.encode("utf-8", "backslashreplace").decode()


def counted(number: int, noun: str) -> str:
    """Write a count with its noun: `1 shard`, `2,000 shards`, `3 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def content_problems(
    key: str, extensions: Iterable[str], empty: Iterable[str], label: bytes | None
) -> Iterator[tuple[str, str, str]]:
    """Find what training could not use in a sample, as (kind, member, detail); images are not decoded.

    Args:
        key: of the sample.
        extensions: of its members.
        empty: those of members without contents.
        label: contents of the label, None if there is none or it is far too long.
    """
    names = sorted(extensions)
    images = [extension for extension in names if extension in IMAGE_EXTENSIONS]
    if not images:
        yield NO_IMAGE, "", f": its members end in {', '.join(f'.{extension}' for extension in names)}"
    elif len(images) > 1:
        yield TWO_IMAGES, f"{key}.{images[1]}", f", beside .{images[0]}"
    elif images[0] in empty:
        yield EMPTY_IMAGE, f"{key}.{images[0]}", ""
    for extension in names:
        if "." in extension and extension.rpartition(".")[2] in images:
            yield "another image of the same kind", f"{key}.{extension}", _FIRST_DOT
    if LABEL_EXTENSION not in names:
        yield NO_LABEL, "", ""
    elif label is None or label_number(label) is None:
        yield BAD_LABEL, f"{key}.{LABEL_EXTENSION}", f": {(label or b'')[:20]!r}"


def label_number(label: bytes) -> int | None:
    """Read a label, decimal digits; None for anything else."""
    return int(label) if _LABEL.fullmatch(label) else None
