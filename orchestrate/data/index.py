"""What a packed dataset holds: shards, classes, and the digest that names its contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.errors import DataError
from orchestrate.runs import sync_folder

MANIFEST_NAME = "manifest.json"
FORMAT = 1
# A sidecar `<shard>.idx` holds for each sample, little endian: u32 length of its byte range in the tar (headers and
# padding included) and u32 CRC32 of that range. Ranges lie end to end from byte 0, so a sum of lengths is an offset.
SIDECAR_BYTES_PER_SAMPLE = 8


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset: its file name, sample count, size in bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def sidecar(self) -> str:
        """File name of the index beside the tar."""
        return f"{self.name}.idx"


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset but its samples; `classes` is empty for unlabelled data, `info` is free text."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    split: str = "train"
    info: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def num_samples(self) -> int:
        """Count the samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Count the classes; 0 for unlabelled data."""
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """Name the contents: SHA-256 over the shards' checksums and counts, and the classes; not over names or time."""
        contents = [FORMAT, list(self.classes), [[shard.samples, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(contents, separators=(",", ":")).encode()).hexdigest()


def load_manifest(url: str) -> Manifest:
    """Read the manifest of a packed dataset.

    Raises:
        DataError: missing, damaged, of a newer format, or without samples.
    """
    try:
        text = storage.read(storage.join(url, MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{url}: no {MANIFEST_NAME}; make it with `orchestrate data pack SOURCE {url}` (it is written last: a pack "
            "that was interrupted goes on when run again)"
        ) from None
    except OSError as error:
        raise DataError(f"{url}/{MANIFEST_NAME}: cannot be read: {error.strerror or error}") from error
    manifest = _parse(text, storage.join(url, MANIFEST_NAME))
    if not manifest.num_samples:
        raise DataError(f"{url}/{MANIFEST_NAME}: holds no samples; pack a source that has images")
    return manifest


def check_shards(url: str, manifest: Manifest) -> None:
    """Check that every shard and sidecar is there and has its size; reads none of them.

    Raises:
        DataError: names the files that are missing or differ, at most ten.
    """
    problems = [problem for shard in manifest.shards for problem in _shard_problems(url, shard)]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{url}: {len(problems)} files are not what {MANIFEST_NAME} says; copy the dataset again, or "
                        f"run `orchestrate data pack` again, which rewrites damaged shards:{shown}{more}")  # fmt: skip


def dataset_identity(url: str) -> tuple[str, int, tuple[str, ...]]:
    """Say what a run depends on: digest, number of samples, names of the classes in the order of their labels.

    Raises:
        DataError: see `load_manifest`.
    """
    manifest = load_manifest(url)
    return manifest.digest, manifest.num_samples, manifest.classes


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest at once or not at all; the caller has made the shards durable before."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "split": manifest.split,
        "classes": list(manifest.classes),
        "num_samples": manifest.num_samples,
        "digest": manifest.digest,
        "shards": [vars(shard) for shard in manifest.shards],
        "info": dict(manifest.info),
    }
    write_atomically(folder / MANIFEST_NAME, json.dumps(fields, indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any point leaves the old one or the whole new one."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _parse(text: bytes, file_url: str) -> Manifest:
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise DataError(f"{file_url}: format {fields['format']}, this version reads {FORMAT}; update orchestrate")
        manifest = Manifest(
            shards=tuple(
                Shard(str(shard["name"]), int(shard["samples"]), int(shard["bytes"]), str(shard["sha256"]))
                for shard in fields["shards"]
            ),
            classes=tuple(str(name) for name in fields["classes"]),
            split=str(fields["split"]),
            info=dict(fields.get("info", {})),
        )
        stated = fields["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file_url}: damaged ({type(error).__name__}: {error}); pack again with --overwrite, or copy it again"
        ) from error
    if stated != manifest.digest:
        raise DataError(f"{file_url}: edited or damaged: its digest does not match its shards; copy it again")
    return manifest


def _shard_problems(url: str, shard: Shard) -> list[str]:
    expected = {shard.name: shard.bytes, shard.sidecar: shard.samples * SIDECAR_BYTES_PER_SAMPLE}
    problems = []
    for name, num_bytes in expected.items():
        try:
            found = storage.size(storage.join(url, name))
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            continue
        if found != num_bytes:
            problems.append(f"{name}: {found:,} bytes, should be {num_bytes:,}")
    return problems
