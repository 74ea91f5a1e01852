"""What is known of a shard once it was read, kept beside the index: the next run reads only what changed."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from orchestrate.data import storage
from orchestrate.data.index import SIDECAR_BYTES_PER_SAMPLE, Shard
from orchestrate.data.problems import Problem
from orchestrate.data.storage import ObjectInfo
from orchestrate.data.tar_scan import Scan
from orchestrate.errors import DataError, StorageError

FOLDER = "index-records"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One shard: `keys` are hashes of its samples' keys, `kinds` counts its problems; see `tar_scan.Scan`."""

    shard: Shard
    class_counts: Mapping[int, int]
    kinds: Mapping[str, int]
    problems: tuple[Problem, ...]
    cut: str
    keys: array[int]


def record_of(scan: Scan, version: str) -> Record:
    """Keep of a scan what the manifest is made of."""
    shard = Shard(scan.name, scan.samples, scan.bytes, scan.sha256, version)
    return Record(shard, scan.class_counts, scan.kinds, tuple(scan.problems), scan.cut, scan.keys)


def write_record(dest: str, record: Record) -> None:
    """Write a record; its sidecar is there already."""
    fields = {
        "format": _FORMAT,
        "shard": astuple(record.shard),
        "class_counts": list(record.class_counts.items()),
        "kinds": dict(record.kinds),
        "problems": [astuple(problem) for problem in record.problems],
        "cut": record.cut,
        "keys": base64.b64encode(record.keys.tobytes()).decode(),
    }
    storage.write(_url(dest, record.shard.name), json.dumps(fields).encode())


def load_record(dest: str, name: str, found: ObjectInfo) -> Record | None:
    """Read a record; None if there is none, or the shard or its sidecar is not what it was.

    Raises:
        StorageError: the store did not answer.
    """
    try:
        record = _parse(storage.read(_url(dest, name)))
        sidecar_bytes = storage.size(storage.join(dest, record.shard.sidecar))
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    unchanged = found.version and (record.shard.bytes, record.shard.version) == (found.size, found.version)
    return record if unchanged and sidecar_bytes == record.shard.samples * SIDECAR_BYTES_PER_SAMPLE else None


def _parse(text: bytes) -> Record:
    fields = json.loads(text)
    if fields["format"] != _FORMAT:
        raise ValueError("a record of another format")
    return Record(
        Shard(*fields["shard"]),
        {int(number): int(count) for number, count in fields["class_counts"]},
        fields["kinds"],
        tuple(Problem(*problem) for problem in fields["problems"]),
        str(fields["cut"]),
        array("Q", base64.b64decode(fields["keys"])),
    )


def _url(dest: str, name: str) -> str:
    return storage.join(dest, f"{FOLDER}/{name}.json")
