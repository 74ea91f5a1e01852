"""Fashion-MNIST as a source: from the Debian package, else downloaded by torchvision."""

from __future__ import annotations

import gzip
import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrate.data.images import grey_png
from orchestrate.data.pack_sources import Item, Source
from orchestrate.errors import DataError

# Order of the labels 0-9 (Xiao et al. 2017, arXiv:1708.07747, table 2).
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
_PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILE_PREFIX = {"train": "train", "val": "t10k", "test": "t10k"}


def fashion_mnist(split: str) -> Source:
    """List the 60,000 training images (`train`) or the 10,000 test images (`val` or `test`), in their own order.

    Raises:
        DataError: no such split, or neither the Debian package nor the network is there.
    """
    if split not in _FILE_PREFIX:
        raise DataError(f"fashion-mnist: split `{split}`: there are {', '.join(_FILE_PREFIX)}")
    folder, prefix = _find(_FILE_PREFIX[split]), _FILE_PREFIX[split]
    file = folder / f"{prefix}-images-idx3-ubyte.gz"
    labels = _load(folder / f"{prefix}-labels-idx1-ubyte.gz")
    size, version = len(grey_png(np.zeros((28, 28), dtype=np.uint8))), file.stat().st_size
    items = [
        Item(f"{prefix}-{number:05d}", "png", str(number), CLASSES[label], size, version)
        for number, label in enumerate(labels.tolist())
    ]
    return Source(items, CLASSES, partial(_read, file))


def _read(file: Path, item: Item) -> bytes:
    return grey_png(_load(file)[int(item.where)])


@lru_cache(maxsize=2)
def _load(file: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file: two zero bytes, type 8 (uint8), number of axes, then the big-endian length of each axis."""
    try:
        data = gzip.decompress(file.read_bytes())
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4).tolist()
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{file}: damaged or unreadable: {error}; install or download it again") from error


def _find(prefix: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "orchestrate"
    downloaded = cache / "FashionMNIST" / "raw"
    for folder in (_PACKAGE_FOLDER, downloaded):
        if all((folder / f"{prefix}-{part}-ubyte.gz").is_file() for part in ("images-idx3", "labels-idx1")):
            return folder
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"fashion-mnist: download failed: {error}; install the Debian package dataset-fashion-mnist instead"
        ) from error
    return downloaded
