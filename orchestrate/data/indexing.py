"""Make an index for shards that somebody else wrote: read each once, write sidecars, then the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrate.data import storage
from orchestrate.data.class_names import known_classes, label_problem, numbered, renamed
from orchestrate.data.duplicate_keys import repeated_keys
from orchestrate.data.index import Manifest, load_manifest, write_manifest
from orchestrate.data.index_records import (
    Record,
    gather_records,
    load_gathered,
    load_record,
    owner_of_records,
    record_of,
    still_holds,
    write_owner,
    write_record,
)
from orchestrate.data.shard_pool import Meter, ShardProgress, default_workers, work_on_shards
from orchestrate.data.shards import read_sample
from orchestrate.data.storage import TAR_SUFFIX
from orchestrate.data.tar_problems import DUPLICATE, NO_LABEL, Problem, counted
from orchestrate.data.tar_scan import scan_tar
from orchestrate.errors import DataError, StorageError

_LISTED_PER_KIND = 20


@dataclass(frozen=True)
class IndexReport:
    """What was indexed: `counts` says how many problems of each kind there are, `problems` lists some of each.

    `unusable` counts samples that training could never use; images that cannot be decoded come on top.
    """

    manifest: Manifest
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]
    unusable: int = 0


@dataclass(frozen=True)
class _Place:
    """Where the tars lie, which of them are meant ("" for all), and where their index goes."""

    base: str
    chosen: str
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
    overwrite: bool = False,
    progress: Callable[[ShardProgress], None] | None = None,
) -> IndexReport:
    """Index tars that lie anywhere, reading each byte once; the tars are not changed.

    Run it again after an interruption: shards whose size and version agree with what was recorded are not read again.
    The manifest is written last.

    Args:
        url: folder of the tars, one tar, or a pattern such as `s3://bucket/train-{000..127}.tar`.
        dest: folder for manifest and sidecars, by default that of the tars.
        classes: names in order of the labels, by default those of the manifest that is there, or the numbers. Labels
            are what the tars say: names that a manifest of the tars has can be added to, not exchanged.
        split: what the manifest calls the data.
        workers: shards that are read at a time.
        accept_cut: leave out what lies beyond the cut of cut tars, or the end mark of joined ones, rather than refuse.
        overwrite: replace an index of other tars in `dest`, or its class names.
        progress: called with how far the work is, now and then.

    Raises:
        DataError: no tars, compressed or cut ones, no room for the index, an index of other tars, a packed dataset, or
            classes that do not fit the labels.
        StorageError: a store did not answer; run again to go on.
    """
    names, place = list_shards(url), _place(url, dest)
    known = _claim(place, overwrite)
    write_owner(place.dest, place.manifest_base)
    records = _read_shards(place, names, workers or default_workers(place.base), progress)
    _refuse_cut(url, records, accept_cut)
    counts, problems = _gather(place, records)
    labels = sum((Counter(record.class_counts) for record in records), Counter[int]())
    class_names = _class_names(url, labels, classes, known, overwrite)
    info = {
        "source": url,
        "class_counts": [labels[number] for number in range(len(class_names))],
        "cut": [record.shard.name for record in records if record.cut],
        "problems": counts,
    }
    manifest = Manifest(tuple(record.shard for record in records), class_names, split, info, place.manifest_base)
    if not manifest.num_samples:
        raise DataError(f"{url}: {counted(len(names), 'tar')} without any sample; is this the right folder?")
    _claim(place, overwrite)  # another index may have been written there meanwhile
    write_manifest(place.dest, manifest)
    gather_records(place.dest, records)
    unusable = sum(record.unusable + (record.unlabelled if class_names else 0) for record in records)
    return IndexReport(manifest, counts, tuple(problems), unusable)


def list_shards(url: str) -> list[str]:
    """List tars by name, in the order of their ids.

    Raises:
        DataError: there are none, or compressed ones among them.
    """
    path = storage.local_path(url)
    if path is not None and path.is_file() and storage.base_folder(url) == url:
        raise DataError(f"{url}: a file, and not a tar by its name; give a folder of .tar files, one, or a pattern")
    try:
        names = storage.list_tars(url)
    except FileNotFoundError:
        raise DataError(f"{url}: no such folder; give a folder of .tar files, one, or a pattern") from None
    except (OSError, NotImplementedError) as error:  # fsspec's stores that cannot list raise the latter
        if isinstance(error, StorageError):
            raise
        raise DataError(
            f"{url}: cannot be listed: {error}; where a server lists nothing, give a pattern such as "
            f"{url}/train-{{000..127}}.tar"
        ) from error
    compressed = [name for name in names if not name.endswith(TAR_SUFFIX)]
    if compressed:
        raise DataError(
            f"{url}: compressed: {len(compressed):,} of {counted(len(names), 'tar')}, such as {compressed[0]}: a "
            "sample cannot be read out of the middle of one; repack them with `orchestrate data pack`, which reads "
            "gzip, bzip2 and xz, or decompress them (images hardly shrink), or give a pattern that leaves them out"
        )
    if not names:
        raise DataError(f"{url}: no .tar files; give a folder of them, one, or a pattern")
    return names


def _place(url: str, dest: str | None) -> _Place:
    """Name folders as any process will find them, from whatever folder it is started in."""
    base = storage.base_folder(url)
    return _Place(_absolute(base), storage.chosen_tars(url), _absolute(dest or base))


def _absolute(url: str) -> str:
    path = storage.local_path(url)
    return url.rstrip("/") if path is None else str(path.resolve())


def _claim(place: _Place, overwrite: bool) -> tuple[str, ...]:
    """Check that the index may be written, and return the names of the classes as far as they are known.

    Raises:
        DataError: the folder holds another index.
    """
    try:
        manifest = load_manifest(place.dest)
    except StorageError:
        raise
    except DataError:  # none, or damaged: it is made anew
        _check_owner(place, owner_of_records(place.dest), place.chosen, overwrite)
        return known_classes(place.base)
    if "recipe" in manifest.info:
        raise DataError(
            f"{place.dest}: a packed dataset, which has its index; mend it with `orchestrate data verify {place.dest} "
            "--repair`, or index it into another folder with --to"
        )
    chosen = storage.chosen_tars(str(manifest.info.get("source", "")))
    _check_owner(place, manifest.base, chosen, overwrite)
    return manifest.classes if manifest.base == place.manifest_base else known_classes(place.base)


def _check_owner(place: _Place, base: str | None, chosen: str, overwrite: bool) -> None:
    """Refuse to replace the index of other tars: a run that uses it would go on with other data."""
    if overwrite or base is None or (base, chosen) == (place.manifest_base, place.chosen):
        return
    other, this = (storage.join(*names).rstrip("/") for names in ((base or place.dest, chosen),
                                                                  (place.base, place.chosen)))  # fmt: skip
    raise DataError(
        f"{place.dest}: holds the index of {other}, not of {this}; choose another folder with --to, or replace it with "
        "--overwrite"
    )


def _read_shards(
    place: _Place, names: Sequence[str], workers: int, progress: Callable[[ShardProgress], None] | None
) -> list[Record]:
    gathered = load_gathered(place.dest)
    try:
        return work_on_shards(
            names,
            lambda name, meter: _read_shard(place, name, meter, gathered.get(name)),
            workers=workers,
            progress=progress,
        )
    except StorageError as error:
        raise StorageError(f"{error}; run again to go on from here") from error
    except _MissingError:
        raise _missing_shards(place, names) from None
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise DataError(f"{reason}; run again to go on from here") from error


class _MissingError(DataError):
    """A shard that a pattern names is not there."""


def _missing_shards(place: _Place, names: Sequence[str]) -> DataError:
    """Name the first shard that is missing, and how many are; asks for each, since some stores list nothing."""
    missing = [name for name in names if not storage.exists(storage.join(place.base, name))]
    first = storage.join(place.base, missing[0]) if missing else place.base
    return DataError(f"{first}: no such shard; {len(missing):,} of {len(names):,} are missing; check the pattern")


def _read_shard(place: _Place, name: str, meter: Meter, gathered: Record | None) -> Record:
    """Index one shard, unless that was done before."""
    url = storage.join(place.base, name)
    try:
        before = storage.info(url)
    except FileNotFoundError:
        raise _MissingError(url) from None
    meter.expect(before.size)
    record = gathered if gathered is not None and still_holds(place.dest, gathered, before) else None
    record = record or load_record(place.dest, name, before)
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
            f"{url}: not whole: {len(cut)} of {counted(len(records), 'tar')}; copy or write them again, or leave out "
            f"what lies beyond the cuts with --accept-cut (what was read is kept):{shown}{more}"
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
    url: str, labels: Mapping[int, int], given: Sequence[str] | None, known: Sequence[str], overwrite: bool
) -> tuple[str, ...]:
    if not labels:
        if given:
            raise DataError(f"{url}: {counted(len(given), 'class')} given, and no sample has a label (a member .cls)")
        return ()
    problem = label_problem(max(labels), given)
    if problem:
        raise DataError(f"{url}: {problem}")
    if given is None:
        return tuple(known) if len(known) > max(labels) else numbered(max(labels) + 1)
    others = [] if overwrite else renamed(labels, known, given)
    if others:
        raise DataError(
            f"{url}: {counted(len(others), 'class')} with other names in the manifest that is there: {others[0]}; an "
            "index renumbers no labels: `orchestrate data pack --classes-from` does so by name; wrong names are "
            "replaced with --overwrite"
        )
    return tuple(given)
