"""What an indexed dataset holds: shards, classes, and the digest that names its contents."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.data.retry import PATIENCE, Patience
from orchestrate.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT = 2
# Part of every digest: a manifest of format 2 names the same contents by the same digest as one of format 1.
_DIGEST_FORMAT = 1
# A store may hand out a manifest that is cut or damaged on its way: it is read again before it is refused.
_PAUSES_SECONDS = (0.1, 0.4)
# A sidecar `<shard>.idx` holds for each sample, little endian: u32 length of its byte range in the tar (headers and
# padding included) and u32 CRC32 of that range. Ranges lie end to end from byte 0, so a sum of lengths is an offset.
SIDECAR_ENTRY = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a dataset: its file name, sample count, size in bytes, SHA-256, and what marks a change of it.

    `version` is what the store called the object when it was indexed, see `storage.ObjectInfo`; "" if nobody looked.
    `sidecar_crc` is the CRC32 of the sidecar file, 8 hex digits; "" in manifests of older versions.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    version: str = ""
    sidecar_crc: str = ""

    @property
    def sidecar(self) -> str:
        """File name of the index beside the manifest."""
        return f"{self.name}.idx"


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset but its samples; `classes` is empty for unlabelled data, `info` is free text.

    `base` is the folder of the tars, "" where they lie beside the manifest; sidecars always lie beside the manifest.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    split: str = "train"
    info: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

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
        contents = [_DIGEST_FORMAT, list(self.classes), [[shard.samples, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(contents, separators=(",", ":")).encode()).hexdigest()

    def shard_url(self, url: str, shard: Shard) -> str:
        """Say where a tar lies, of the dataset whose manifest lies at `url`."""
        return storage.join(self.base or url, shard.name)

    def sidecar_url(self, url: str, shard: Shard) -> str:
        """Say where the index of a tar lies, of the dataset whose manifest lies at `url`."""
        return storage.join(url, shard.sidecar)


def load_manifest(url: str, *, patience: Patience = PATIENCE) -> Manifest:
    """Read the manifest of a packed or indexed dataset; a damaged one is read again if it came from a store.

    Args:
        url: of the dataset.
        patience: with a store that does not answer.

    Raises:
        DataError: missing, damaged, of a newer format, or without samples.
        StorageError: the store did not answer.
    """
    for pause_seconds in _PAUSES_SECONDS if storage.local_path(url) is None else ():
        try:
            return _check_samples(url, _parse(_read(url, patience), storage.join(url, MANIFEST_NAME)))
        except _DamagedError:
            time.sleep(pause_seconds)
    return _check_samples(url, _parse(_read(url, patience), storage.join(url, MANIFEST_NAME)))


class _DamagedError(DataError):
    """The text is not what was written."""


def _read(url: str, patience: Patience) -> bytes:
    try:
        return storage.read(storage.join(url, MANIFEST_NAME), patience=patience)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{url}: no {MANIFEST_NAME}; make it with `orchestrate data pack SOURCE {url}`, or with `orchestrate data "
            f"index {url}` where shards are there already (it is written last: what was interrupted goes on when run "
            "again)"
        ) from None
    except OSError as error:
        raise DataError(f"{url}/{MANIFEST_NAME}: cannot be read: {error.strerror or error}") from error


def _check_samples(url: str, manifest: Manifest) -> Manifest:
    if not manifest.num_samples:
        raise DataError(f"{url}/{MANIFEST_NAME}: holds no samples; pack a source that has images")
    return manifest


def check_shards(url: str, manifest: Manifest) -> None:
    """Check that every local shard and sidecar is there and has its size; reads none of them.

    Files of other stores are not looked at: a large set would cost a request each before the first batch. They are
    checked when they are first read, all of them by `orchestrate data verify`.

    Raises:
        DataError: names the files that are missing or differ, at most ten.
    """
    if storage.local_path(url) is None and storage.local_path(manifest.base or url) is None:
        return
    problems = [problem for shard in manifest.shards for problem in _shard_problems(url, manifest, shard)]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        num_files = "1 file is" if len(problems) == 1 else f"{len(problems):,} files are"
        raise DataError(f"{url}: {num_files} not what {MANIFEST_NAME} says; copy the dataset again, or "
                        f"run `orchestrate data pack` again, which rewrites damaged shards:{shown}{more}")  # fmt: skip


def dataset_identity(url: str, *, patience: Patience = PATIENCE) -> tuple[str, int, tuple[str, ...]]:
    """Say what a run depends on: digest, number of samples, names of the classes in the order of their labels.

    Args:
        url: of the dataset.
        patience: with a store that does not answer.

    Raises:
        DataError: see `load_manifest`.
    """
    manifest = load_manifest(url, patience=patience)
    return manifest.digest, manifest.num_samples, manifest.classes


def write_manifest(url: str | Path, manifest: Manifest) -> None:
    """Write the manifest at once or not at all; the caller has made shards and sidecars durable before.

    Raises:
        OSError: the folder cannot be written.
        DataError: the store cannot.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "split": manifest.split,
        "classes": list(manifest.classes),
        "num_samples": manifest.num_samples,
        "digest": manifest.digest,
        "base": manifest.base,
        "info": dict(manifest.info),
    }
    # A line for each shard, without the names of its fields: 100 bytes of 100,000 shards are 10 MB.
    rows = [list(astuple(shard)) for shard in manifest.shards]
    head["checksum"] = _checksum({**head, "shards": rows})
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'
    storage.write(storage.join(str(url), MANIFEST_NAME), text.encode())


def _checksum(fields: Mapping[str, Any]) -> str:
    """Sum up all fields but the checksum itself, however the file is laid out."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _parse(text: bytes, file_url: str) -> Manifest:
    try:
        fields = json.loads(text)
        if fields["format"] not in (1, FORMAT):
            raise DataError(
                f"{file_url}: format {fields['format']}, this version reads 1 and {FORMAT}; update orchestrate"
            )
        checksum_holds = fields.get("checksum") in (None, _checksum(fields))
        manifest = Manifest(
            shards=tuple(map(_parse_shard, fields.pop("shards"))),
            classes=tuple(str(name) for name in fields["classes"]),
            split=str(fields["split"]),
            info=dict(fields.get("info", {})),
            base=str(fields.get("base", "")),
        )
        stated = fields["digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(
            f"{file_url}: damaged ({type(error).__name__}: {error}); pack or index again, or copy it again"
        ) from error
    if stated != manifest.digest:
        raise _DamagedError(f"{file_url}: edited or damaged: its digest does not match its shards; copy it again")
    if not checksum_holds:
        raise _DamagedError(
            f"{file_url}: edited or damaged: its checksum does not match; copy it again, or take the line `checksum` "
            "out if you changed the file yourself"
        )
    return manifest


def _parse_shard(row: Any) -> Shard:
    """Read a shard as it is written now (a list), or as format 1 wrote it (an object)."""
    if isinstance(row, dict):
        row = [row[name] for name in ("name", "samples", "bytes", "sha256")] + [row.get("version", "")]
    name, samples, num_bytes, sha256, version, *later = row
    return Shard(str(name), int(samples), int(num_bytes), str(sha256), str(version), *map(str, later))


def _shard_problems(url: str, manifest: Manifest, shard: Shard) -> list[str]:
    expected = {
        manifest.shard_url(url, shard): (shard.name, shard.bytes),
        manifest.sidecar_url(url, shard): (shard.sidecar, shard.samples * SIDECAR_ENTRY.size),
    }
    problems = []
    for file_url, (name, num_bytes) in expected.items():
        if storage.local_path(file_url) is None:
            continue
        try:
            found = storage.size(file_url)
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            continue
        if found != num_bytes:
            problems.append(f"{name}: {found:,} bytes, should be {num_bytes:,}")
    return problems
