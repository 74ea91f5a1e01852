"""What is known of a shard once it was read, kept beside the index: the next run reads only what changed.

While an index is made, each shard has a file of its own, so that a killed run loses nothing; afterwards all are one.
"""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from orchestrate.data import storage
from orchestrate.data.index import SIDECAR_ENTRY, Shard
from orchestrate.data.shards import sidecar_crc
from orchestrate.data.storage import ObjectInfo
from orchestrate.data.tar_problems import Problem
from orchestrate.data.tar_scan import Scan
from orchestrate.errors import DataError, StorageError

FOLDER = "index-records"
_GATHERED = "index-records.jsonl"
_OWNER = f"{FOLDER}/source.json"
_FORMAT = 2  # format 1 knew no checksum of the sidecar


@dataclass(frozen=True)
class Record:
    """One shard: `keys` are hashes of its samples' keys, `kinds` counts its problems; see `tar_scan.Scan`.

    `unusable` counts samples that training cannot use, `unlabelled` those that lack but a label for it.
    """

    shard: Shard
    class_counts: Mapping[int, int]
    kinds: Mapping[str, int]
    problems: tuple[Problem, ...]
    cut: str
    keys: array[int]
    unusable: int
    unlabelled: int


def record_of(scan: Scan, version: str) -> Record:
    """Keep of a scan what the manifest is made of."""
    shard = Shard(scan.name, scan.samples, scan.bytes, scan.sha256, version, sidecar_crc(scan.entries))
    problems = tuple(scan.problems)
    counts = scan.unusable, scan.unlabelled
    return Record(shard, scan.class_counts, scan.kinds, problems, scan.cut, scan.keys, *counts)


def write_record(dest: str, record: Record) -> None:
    """Write a record; its sidecar is there already."""
    storage.write(_url(dest, record.shard.name), _text(record))


def gather_records(dest: str, records: Sequence[Record]) -> None:
    """Keep all records in one file, now that the manifest is written; those of single shards are removed.

    Raises:
        OSError, DataError, StorageError: it cannot be written.
    """
    storage.write(storage.join(dest, _GATHERED), b"".join(_text(record) + b"\n" for record in records))
    storage.remove_folder(storage.join(dest, FOLDER))


def load_gathered(dest: str) -> dict[str, Record]:
    """Read the records that an earlier run gathered, by name of the shard; none where they are missing or damaged.

    Raises:
        StorageError: the store did not answer.
    """
    try:
        records = map(_parse, storage.read(storage.join(dest, _GATHERED)).splitlines())
        return {record.shard.name: record for record in records}
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return {}


def write_owner(dest: str, base: str) -> None:
    """Note whose records are begun: those of tars in the folder `base`, "" for `dest` itself.

    Raises:
        DataError: it cannot be written there.
        StorageError: the store did not answer.
    """
    try:
        storage.write(storage.join(dest, _OWNER), json.dumps({"base": base}).encode())
    except StorageError:
        raise
    except (OSError, DataError) as error:
        raise DataError(
            f"{dest}: the index cannot be written there: {error}; put it elsewhere with --to FOLDER, a local "
            "path or a store that you may write"
        ) from error


def owner_of_records(dest: str) -> str | None:
    """Read what `write_owner` noted; None if there is nothing.

    Raises:
        StorageError: the store did not answer.
    """
    try:
        return str(json.loads(storage.read(storage.join(dest, _OWNER)))["base"])
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def _text(record: Record) -> bytes:
    fields = {
        "format": _FORMAT,
        "shard": astuple(record.shard),
        "class_counts": list(record.class_counts.items()),
        "kinds": dict(record.kinds),
        "problems": [astuple(problem) for problem in record.problems],
        "cut": record.cut,
        "keys": base64.b64encode(record.keys.tobytes()).decode(),
        "unusable": [record.unusable, record.unlabelled],
    }
    return json.dumps(fields).encode()


def load_record(dest: str, name: str, found: ObjectInfo) -> Record | None:
    """Read a record; None if there is none, or the shard or its sidecar is not what it was.

    Raises:
        StorageError: the store did not answer.
    """
    try:
        record = _parse(storage.read(_url(dest, name)))
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return record if still_holds(dest, record, found) else None


def still_holds(dest: str, record: Record, found: ObjectInfo) -> bool:
    """Say whether a shard is what it was when its record was made, and its sidecar is there.

    Raises:
        StorageError: the store did not answer.
    """
    shard = record.shard
    if not found.version or (shard.bytes, shard.version) != (found.size, found.version):
        return False
    try:
        return storage.size(storage.join(dest, shard.sidecar)) == shard.samples * SIDECAR_ENTRY.size
    except StorageError:
        raise
    except (OSError, DataError):
        return False


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
        *map(int, fields["unusable"]),
    )


def _url(dest: str, name: str) -> str:
    return storage.join(dest, f"{FOLDER}/{name}.json")
