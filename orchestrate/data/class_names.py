"""Names of classes in the order of their labels: where they come from, and that no label gets another's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrate.data import storage
from orchestrate.data.index import MANIFEST_NAME, load_manifest
from orchestrate.data.tar_problems import MOST_CLASSES, counted
from orchestrate.errors import DataError, StorageError


def load_classes(source: str) -> tuple[str, ...]:
    """Read class names, in order of their labels: from a text file, one a line, or from an indexed dataset.

    Raises:
        DataError: neither is there, or a name occurs twice or is empty.
    """
    path = storage.local_path(source)
    if path is None or path.is_dir():
        return load_manifest(source).classes
    names = _lines(path)
    if not names:
        raise DataError(f"{source}: is empty; give each class a line")
    if "" in names:
        raise DataError(
            f"{source}:{names.index('') + 1}: a blank line, and all names after it would belong to other labels; take "
            "it out, or write a name for that label"
        )
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise DataError(f"{source}: the class {repeated!r} twice; give each class a line")
    return names


def known_classes(url: str) -> tuple[str, ...]:
    """Return the classes of the manifest in a folder; none where there is none, or it cannot be read.

    Raises:
        StorageError: the store did not answer.
    """
    try:
        return load_manifest(url).classes
    except StorageError:
        raise
    except DataError:
        return ()


def are_names(classes: Sequence[str]) -> bool:
    """Say whether classes are called by names, not merely by their numbers."""
    return tuple(classes) != numbered(len(classes))


def numbered(count: int) -> tuple[str, ...]:
    """Call classes by their numbers."""
    return tuple(str(number) for number in range(count))


def label_problem(largest: int, given: Sequence[str] | None) -> str:
    """Say why labels up to `largest` cannot be numbers of classes; "" if they can."""
    if given is not None and len(given) <= largest:
        return f"{counted(len(given), 'class')} given, labels go up to {largest}; give a name for each from 0"
    if largest >= MOST_CLASSES:
        return f"a label {largest}: too large for the number of a class; number the classes from 0"
    return ""


def renamed(labels: Iterable[int], known: Sequence[str], given: Sequence[str]) -> list[str]:
    """Describe each label that a list of names calls otherwise than the manifest of the shards does."""
    if not are_names(known):
        return []
    return [f"label {label} is {known[label]!r} there and {given[label]!r} in the list"
            for label in sorted(labels) if label < len(known) and known[label] != given[label]]  # fmt: skip


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; give a text file of one class a line, or a dataset with {MANIFEST_NAME}"
        ) from error
