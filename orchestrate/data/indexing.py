"""Make an index for shards that somebody else wrote: read each once, write sidecars, then the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrate.data import storage
from orchestrate.data.duplicates import repeated_keys
from orchestrate.data.index import MANIFEST_NAME, Manifest, load_manifest, write_manifest
from orchestrate.data.index_records import Record, load_record, record_of, write_record
from orchestrate.data.problems import DUPLICATE, MOST_CLASSES, NO_LABEL, Problem
from orchestrate.data.shard_pool import Meter, ShardProgress, default_workers, work_on_shards
from orchestrate.data.shards import read_sample
from orchestrate.data.storage import TAR_SUFFIX
from orchestrate.data.tar_scan import scan_tar
from orchestrate.errors import DataError, StorageError

_LISTED_PER_KIND = 20
_OWNER = "index-records/source.json"


@dataclass(frozen=True)
class IndexReport:
    """What was indexed: `counts` says how many problems of each kind there are, `problems` lists some of each."""

    manifest: Manifest
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Place:
    """Where the tars lie, and where their index goes."""

    base: str
    dest: str

    @property
    def manifest_base(self) -> str:
        return "" if self.base == self.dest else self.base


def index(
    url: str,
    *,
    dest: str | None = None,
    classes: Sequence[str] | None = None,
    split: str = "train",
    workers: int | None = None,
    accept_cut: bool = False,
    progress: Callable[[ShardProgress], None] | None = None,
) -> IndexReport:
    """Index tars that lie anywhere, reading each byte once; the tars are not changed.

    Run it again after an interruption: shards whose size and version agree with what was recorded are not read again.
    The manifest is written last.

    Args:
        url: folder of the tars, one tar, or a pattern such as `s3://bucket/train-{000..127}.tar`.
        dest: folder for manifest and sidecars, by default that of the tars.
        classes: names in order of the labels, by default those of the manifest that is there, or the numbers.
        split: what the manifest calls the data.
        workers: shards that are read at a time.
        accept_cut: leave out what lies beyond the cut of cut tars, rather than refuse them.
        progress: called with how far the work is, now and then.

    Raises:
        DataError: no tars, compressed or cut ones, no room for the index, or classes that do not fit the labels.
        StorageError: a store did not answer; run again to go on.
    """
    names, place = list_shards(url), _place(url, dest)
    known = _claim(place)
    records = _read_shards(place, names, workers or default_workers(place.base), progress)
    _refuse_cut(url, records, accept_cut)
    counts, problems = _gather(place, records)
    labels = sum((Counter(record.class_counts) for record in records), Counter[int]())
    class_names = _class_names(url, labels, classes, known)
    info = {
        "source": url,
        "class_counts": [labels[number] for number in range(len(class_names))],
        "cut": [record.shard.name for record in records if record.cut],
        "problems": counts,
    }
    manifest = Manifest(tuple(record.shard for record in records), class_names, split, info, place.manifest_base)
    if not manifest.num_samples:
        raise DataError(f"{url}: {len(names):,} tars hold no samples; is this the right folder?")
    write_manifest(place.dest, manifest)
    return IndexReport(manifest, counts, tuple(problems))


def list_shards(url: str) -> list[str]:
    """List tars by name, in the order of their ids.

    Raises:
        DataError: there are none, or compressed ones among them.
    """
    try:
        names = storage.list_tars(url)
    except FileNotFoundError:
        raise DataError(f"{url}: no such folder; give a folder of .tar files, one, or a pattern") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, StorageError):
            raise
        raise DataError(
            f"{url}: cannot be listed: {error}; where a server lists nothing, give a pattern such as "
            f"{url}/train-{{000..127}}.tar"
        ) from error
    compressed = [name for name in names if not name.endswith(TAR_SUFFIX)]
    if compressed:
        raise DataError(
            f"{url}: {len(compressed):,} of {len(names):,} tars are compressed, such as {compressed[0]}: a sample "
            "cannot be read out of the middle of one; repack them with `orchestrate data pack`, which reads such "
            "tars, or decompress them (images hardly shrink), or give a pattern that leaves them out"
        )
    if not names:
        raise DataError(f"{url}: no .tar files; give a folder of them, one, or a pattern")
    return names


def _place(url: str, dest: str | None) -> _Place:
    """Name folders as any process will find them, from whatever folder it is started in."""
    base, target = (_absolute(folder) for folder in (storage.base_folder(url), dest or storage.base_folder(url)))
    return _Place(base, target)


def _absolute(url: str) -> str:
    path = storage.local_path(url)
    return url.rstrip("/") if path is None else str(path.resolve())


def _claim(place: _Place) -> tuple[str, ...]:
    """Check that the index may be written, and return the classes of one that is there.

    Raises:
        DataError: the folder holds another index, or cannot be written.
    """
    known: tuple[str, ...] = ()
    owner = _owner_of_records(place.dest)
    try:
        manifest = load_manifest(place.dest)
        owner, known = manifest.base or place.dest, manifest.classes
    except StorageError:
        raise
    except DataError:
        pass  # none, or damaged: it is made anew
    if owner not in ("", place.base):
        raise DataError(f"{place.dest}: holds the index of {owner}; choose another folder with --to")
    try:
        storage.write(storage.join(place.dest, _OWNER), json.dumps({"base": place.base}).encode())
    except StorageError:
        raise
    except (OSError, DataError) as error:
        raise DataError(
            f"{place.dest}: the index cannot be written there: {error}; put it elsewhere with --to FOLDER, a local "
            "path or a store that you may write"
        ) from error
    return known


def _owner_of_records(dest: str) -> str:
    try:
        return str(json.loads(storage.read(storage.join(dest, _OWNER)))["base"])
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return ""


def _read_shards(
    place: _Place, names: Sequence[str], workers: int, progress: Callable[[ShardProgress], None] | None
) -> list[Record]:
    try:
        return work_on_shards(
            names, lambda name, meter: _read_shard(place, name, meter), workers=workers, progress=progress
        )
    except StorageError as error:
        raise StorageError(f"{error}; run again to go on from here") from error
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise DataError(f"{reason}; run again to go on from here") from error


def _read_shard(place: _Place, name: str, meter: Meter) -> Record:
    """Index one shard, unless that was done before."""
    url = storage.join(place.base, name)
    try:
        before = storage.info(url)
    except FileNotFoundError:
        raise DataError(f"{url}: no such shard; check the pattern") from None
    meter.expect(before.size)
    record = load_record(place.dest, name, before)
    if record is not None:
        meter.add(before.size)
        return record
    scan = scan_tar(name, meter.watch(storage.stream(url)))
    if scan.bytes != before.size or storage.info(url) != before:
        raise DataError(f"{url}: changed while it was read; index again when nothing writes to it")
    storage.write(storage.join(place.dest, f"{name}.idx"), bytes(scan.entries))
    record = record_of(scan, before.version)
    write_record(place.dest, record)
    return record


def _refuse_cut(url: str, records: Sequence[Record], accept_cut: bool) -> None:
    cut = [record for record in records if record.cut]
    if cut and not accept_cut:
        shown = "".join(f"\n  {record.shard.name}: {record.cut}" for record in cut[:10])
        more = f"\n  and {len(cut) - 10} more" if len(cut) > 10 else ""
        raise DataError(
            f"{url}: {len(cut)} of {len(records)} tars are not whole; copy or write them again, or leave out what lies "
            f"beyond the cuts with --accept-cut (what was read is kept):{shown}{more}"
        )


def _gather(place: _Place, records: Sequence[Record]) -> tuple[dict[str, int], list[Problem]]:
    """Put the problems of all shards together: how many of each kind, and the first of each."""
    counts = sum((Counter(record.kinds) for record in records), Counter[str]())
    labelled = any(record.class_counts for record in records) or counts["label is no whole number"]
    if not labelled:
        del counts[NO_LABEL]
    listed: Counter[str] = Counter()
    problems = [Problem(record.shard.name, -1, "", "", record.cut) for record in records if record.cut]
    for record in records:
        for problem in record.problems:
            kind = next((kind for kind in counts if problem.reason.startswith(kind)), "")
            listed[kind] += 1
            if kind and listed[kind] <= _LISTED_PER_KIND:
                problems.append(problem)
    repeated = repeated_keys([record.keys for record in records])
    counts.update({DUPLICATE: len(repeated), "cut": sum(bool(record.cut) for record in records)})
    problems += [_repeated_problem(place, records[shard], sample) for shard, sample in repeated[:_LISTED_PER_KIND]]
    return {kind: count for kind, count in sorted(counts.items()) if count}, problems


def _repeated_problem(place: _Place, record: Record, sample: int) -> Problem:
    """Name a sample whose key an earlier shard has; only hashes of keys are kept, so it is read once more."""
    url, sidecar = (storage.join(folder, name) for folder, name in
                    ((place.base, record.shard.name), (place.dest, record.shard.sidecar)))  # fmt: skip
    key = read_sample(url, sidecar, sample)[0]
    return Problem(record.shard.name, sample, key, "", f"{DUPLICATE}: a sample of an earlier shard has it")


def _class_names(
    url: str, labels: Mapping[int, int], given: Sequence[str] | None, known: Sequence[str]
) -> tuple[str, ...]:
    if not labels:
        if given:
            raise DataError(f"{url}: {len(given)} classes given, and no sample has a label (a member .cls)")
        return ()
    largest = max(labels)
    if given is not None:
        if len(given) <= largest:
            raise DataError(
                f"{url}: {len(given)} classes given, labels go up to {largest}; give a name for each from 0"
            )
        return tuple(given)
    if len(known) > largest:
        return tuple(known)
    if largest >= MOST_CLASSES:
        raise DataError(f"{url}: a label {largest}: too large for the number of a class; repack with labels from 0")
    return tuple(str(number) for number in range(largest + 1))


def load_classes(source: str) -> tuple[str, ...]:
    """Read class names, in order of their labels: from a text file, one a line, or from an indexed dataset.

    Raises:
        DataError: neither is there, or a name occurs twice.
    """
    path = storage.local_path(source)
    if path is None or path.is_dir():
        return load_manifest(source).classes
    names = _lines(path)
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None or not names:
        raise DataError(
            f"{source}: {'is empty' if not names else f'the class {repeated!r} twice'}; give each class a line"
        )
    return names


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; give a text file of one class a line, or a dataset with {MANIFEST_NAME}"
        ) from error
