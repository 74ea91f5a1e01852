"""What can be packed: an image folder, a CSV or TSV listing, or Fashion-MNIST; each becomes a list of items."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from orchestrate.data.images import SUFFIXES
from orchestrate.data.index import MANIFEST_NAME
from orchestrate.data.shards import member_header
from orchestrate.errors import DataError

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
_UNFIT = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack: its key in the tar, where it is, its class (empty for none), and its size in bytes."""

    key: str
    extension: str
    where: str
    class_name: str
    num_bytes: int
    version: int = 0  # changes when the file does: its modification time


@dataclass(frozen=True)
class Source:
    """Everything to pack, before any image is read; `read` and `read_members` may run in another process.

    `read_members` gives the image and all else that belongs to it, by extension; None where images are alone.
    `skipped` counts what was left out of `items` since it cannot be packed.
    """

    items: Sequence[Item]
    classes: tuple[str, ...]
    read: Callable[[Item], bytes]
    read_members: Callable[[Item], dict[str, bytes]] | None = None
    skipped: int = 0

    @property
    def identity(self) -> str:
        """Hash what was listed: names, classes, sizes and dates; not the folder it lies in."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for item in self.items:
            line = repr((item.key, item.extension, item.class_name, item.num_bytes, item.version))
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def problems_error(subject: object, problems: Sequence[str]) -> DataError:
    """Join problems into one error: the first ten and the count."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    text = "\n  ".join([f"{subject}: {count}; nothing was packed:", *problems[:10], *more])
    # File names need not be UTF-8; the message must be, to be printed.
    return DataError(text.encode("utf-8", "backslashreplace").decode())


def image_folder(root: Path) -> Source:
    """List a folder: its sub-folders are classes; images directly in it are unlabelled.

    Hidden files and folders are left out, so are files that are no images by their suffix.

    Raises:
        DataError: lists all that is wrong, first of all that there is no image.
    """
    problems: list[str] = []
    paths = sorted(_walk(root, problems), key=lambda path: path.parts)
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not images:
        problems.append(_why_no_images(root, len(paths)))
    else:
        problems += _layout_problems(root, images)
    items = [_file_item(root / path, path.as_posix(), path.parts[0] if len(path.parts) > 1 else "") for path in images]
    return _finish(root, items, [item.where for item in items], problems)


def listing(file: Path) -> Source:
    """List the images of a CSV or TSV file with a column `path` (relative to the file) and perhaps `label`.

    Raises:
        DataError: lists all that is wrong, with line numbers.
    """
    problems: list[str] = []
    items, names = [], []
    for line, path, label in _rows(file, problems):
        place, full = f"{file}:{line}: {path}", file.parent / path
        if full.suffix.lower() not in SUFFIXES:
            problems.append(f"{place}: not an image by its suffix ({' '.join(SUFFIXES)})")
        elif not full.is_file():
            problems.append(f"{place}: {'is a folder' if full.is_dir() else 'no such file'}")
        else:
            items.append(_file_item(full, _key_path(path, full), label))
            names.append(place)
    labelled = sum(bool(item.class_name) for item in items)
    if 0 < labelled < len(items):
        problems += [f"{name}: empty label" for name, item in zip(names, items, strict=True) if not item.class_name]
    if not items and not problems:
        problems.append("lists no images")
    return _finish(file, items, names, problems)


def read_file(item: Item) -> bytes:
    """Read the original bytes of an image file."""
    return Path(item.where).read_bytes()


def class_order(names: set[str]) -> tuple[str, ...]:
    """Sort class names: by value if all are whole numbers, else by letter."""
    numeric = all(re.fullmatch(r"\d+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def relabel(source: Source, classes: Sequence[str]) -> Source:
    """Number the classes of a source by a given list, such as that of the training split.

    Raises:
        DataError: the source has a class that is not in the list.
    """
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        asked = f"{len(classes)} classes asked for ({', '.join(classes[:3]) or 'none'}{', ...' if classes[3:] else ''})"
        raise problems_error("classes", [f"{name}: not among the {asked}" for name in unknown])
    return replace(source, classes=tuple(classes)) if source.classes else source


def _finish(subject: Path, items: list[Item], names: list[str], problems: list[str]) -> Source:
    problems += [text for _, text in key_problems(items, names)]
    if problems:
        raise problems_error(subject, problems)
    return Source(items, class_order({item.class_name for item in items} - {""}), read_file)


def key_problems(items: Sequence[Item], names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Find names that a tar or stock webdataset would not give back: number of the item, and what is wrong."""
    seen: dict[str, str] = {}
    for number, (item, name) in enumerate(zip(items, names, strict=True)):
        if "." in PurePosixPath(item.key).name:
            yield number, f"{name}: a dot in the name: readers take all after the first dot as the suffix; rename it"
        elif _UNFIT.search(item.key):
            yield number, f"{name!r}: control character in the name; rename it"
        elif item.key in seen:
            yield number, f"{name}: same key `{item.key}` as {seen[item.key]}; rename one"
        elif len(item.key.encode("utf-8", "surrogateescape")) > 90 and not _fits(item):
            yield number, f"{name}: name too long for a tar; shorten it to 90 bytes"
        seen.setdefault(item.key, name)


def _fits(item: Item) -> bool:
    try:
        return bool(member_header(f"{item.key}.{item.extension}", 0))
    except ValueError:
        return False


def _file_item(path: Path, key_path: str, class_name: str) -> Item:
    stat = path.stat()
    extension = path.suffix.lower().lstrip(".")
    key = str(PurePosixPath(key_path).with_suffix(""))
    return Item(key, {"jpeg": "jpg"}.get(extension, extension), str(path), class_name, stat.st_size, stat.st_mtime_ns)


def _walk(root: Path, problems: list[str]) -> Iterator[Path]:
    """Find all files that are not hidden, relative to `root`; links are followed, but not into a loop."""
    visited: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable):
        stat = Path(folder).stat()
        if (stat.st_dev, stat.st_ino) in visited:
            problems.append(f"{folder}: the same folder was met before; remove the link")
            subfolders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_file():
                yield path.relative_to(root)
            elif path.suffix.lower() in SUFFIXES:
                problems.append(f"{path}: link to a missing file")


def _why_no_images(root: Path, num_files: int) -> str:
    if (root / MANIFEST_NAME).exists():
        return "is a packed dataset already; give the folder of its images"
    if not num_files:
        return "is empty"
    return f"none of its {num_files} files is an image by its suffix ({' '.join(SUFFIXES)})"


def _layout_problems(root: Path, images: list[Path]) -> list[str]:
    """Find layouts whose labels could not be what was meant."""
    folders = {path.parts[0] for path in images if len(path.parts) > 1}
    loose = [path for path in images if len(path.parts) == 1]
    if folders and loose:
        return [f"{len(loose)} images beside the class folders, e.g. {root / loose[0]}; move them into a class"]
    if folders and {name.lower() for name in folders} <= _SPLIT_NAMES:
        return [f"its folders are splits, not classes; pack each by itself, e.g. {root / min(folders)}"]
    subfolders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return [f"{root / name}: class folder without images; remove it or fill it" for name in sorted(subfolders - folders)
            if folders]  # fmt: skip


def _key_path(path: str, full: Path) -> str:
    """Use the path as listed for the key; one that leaves the listing's folder would be unsafe to unpack."""
    plain = os.path.normpath(path)
    return full.resolve().as_posix().lstrip("/") if plain.startswith(("/", "..")) else Path(plain).as_posix()


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    """Read (line, path, label) of each row; label is empty where there is no such column."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    line = 1
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if "path" not in header:
                problems.append(f"{file}:1: no column `path` in the header (found: {', '.join(header) or 'nothing'})")
                return
            for cells in reader:
                line = reader.line_num
                if len(cells) not in (0, len(header)):
                    problems.append(f"{file}:{line}: {len(cells)} cells, the header has {len(header)}")
                elif cells and not (row := dict(zip(header, map(str.strip, cells), strict=True)))["path"]:
                    problems.append(f"{file}:{line}: empty path")
                elif cells:
                    yield line, row["path"], row.get("label", "")
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        problems.append(f"{file}:{line}: cannot be read as UTF-8 text with separated values: {error}")
