"""Check a dataset against its index, name what is wrong, and make the index again where it can be trusted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from orchestrate.data import storage
from orchestrate.data.duplicate_keys import repeated_keys
from orchestrate.data.index import Manifest, Shard, load_manifest, write_manifest
from orchestrate.data.shard_check import (
    Entries,
    ShardFiles,
    check_end,
    check_file,
    is_changed,
    read_entries,
    walk,
)
from orchestrate.data.shard_pool import Meter, ShardProgress, default_workers, work_on_shards
from orchestrate.data.shards import pack_sidecar, parse_sidecar, read_sample, sidecar_crc
from orchestrate.data.tar_problems import DUPLICATE, Problem, counted
from orchestrate.data.tar_scan import scan_tar
from orchestrate.errors import DataError, StorageError

Mode = Literal["quick", "full", "decode"]
_LISTED = 100


@dataclass(frozen=True)
class Verdict:
    """What a check found; `repaired` names the files that were mended, `notes` are no faults."""

    url: str
    mode: Mode
    shards: int
    samples: int
    problems: tuple[Problem, ...]
    repaired: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Say whether nothing is wrong, or no longer."""
        return not self.problems

    def as_facts(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "url": self.url,
            "mode": self.mode,
            "ok": self.is_whole,
            "shards": self.shards,
            "samples": self.samples,
            "problems": [_printable(asdict(problem)) for problem in self.problems],
            "repaired": list(self.repaired),
            "notes": list(self.notes),
        }


def _printable(fields: dict[str, Any]) -> dict[str, Any]:
    """Escape what is no text: names in a tar need not be UTF-8, JSON must be."""
    return {name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
            for name, value in fields.items()}  # fmt: skip


@dataclass(frozen=True)
class _Findings:
    """What one shard's check found; `shard` differs from the manifest's where a new version is to be recorded."""

    shard: Shard
    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    is_same: bool = False  # as the manifest says, by its SHA-256
    is_touched: bool = False  # a local file of another time of change, as any copy is


def verify(
    url: str,
    *,
    mode: Mode = "quick",
    repair: bool = False,
    workers: int | None = None,
    progress: Callable[[ShardProgress], None] | None = None,
) -> Verdict:
    """Compare a dataset with its manifest and sidecars; local or remote.

    Args:
        url: folder of the manifest.
        mode: "quick" looks at names, sizes, versions, sidecars and the end of each shard; "full" reads every byte
            (checksums, layout of each sample, keys that occur twice); "decode" also decodes every image, strictly.
        repair: make sidecars again that are missing or damaged, and record the new version of shards that were only
            copied or touched; both only where the shard's SHA-256 is that of the manifest.
        workers: shards that are checked at a time.
        progress: called with how far the work is, now and then.

    Raises:
        DataError: no manifest, or what is to be repaired cannot be written.
        StorageError: a store did not answer.
    """
    manifest = load_manifest(url)
    files = [ShardFiles.of(url, manifest, shard) for shard in manifest.shards]
    try:
        findings = work_on_shards(
            files,
            lambda one, meter: _check(one, meter, mode, repair),
            workers=workers or default_workers(manifest.base or url),
            progress=progress,
        )
        _record_versions(url, manifest, findings)
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    problems = _unknown_tars(url, manifest) + [problem for found in findings for problem in found.problems]
    problems += _repeated(files, [found.keys for found in findings])
    repaired = tuple(name for found in findings for name in found.repaired)
    return Verdict(url, mode, len(files), manifest.num_samples, tuple(problems), repaired, _notes(manifest, findings))


def _notes(manifest: Manifest, findings: Sequence[_Findings]) -> tuple[str, ...]:
    """Say what a user should know of a dataset that is as its manifest says."""
    touched = [found.shard.name for found in findings if found.is_touched]
    notes = [
        f"{name}: was cut when it was indexed with --accept-cut: samples beyond the cut are not in the index"
        for name in manifest.info.get("cut", ())
    ]
    if touched:
        notes.append(
            f"{counted(len(touched), 'shard')} copied or touched since the index was made, such as {touched[0]}: "
            "--full tells whether the contents are the same, --full --repair records the new times"
        )
    return tuple(notes)


def _check(files: ShardFiles, meter: Meter, mode: Mode, repair: bool) -> _Findings:
    """Check one shard; in quick mode, one that needs repair is read whole too."""
    meter.expect(files.shard.bytes)
    problems = check_file(files)
    if problems and not is_changed(problems[0]):
        return _Findings(files.shard, problems)
    entries, bad_index = read_entries(files)
    if mode != "quick" or (repair and (problems or bad_index)):
        findings = _check_bytes(files, entries, bad_index, meter, decode=mode == "decode", repair=repair)
        return _settle_version(files, findings, problems, repair)
    meter.add(files.shard.bytes)
    is_touched = bool(problems) and storage.local_path(files.url) is not None
    wrong = bad_index or check_end(files, entries or ())
    return _Findings(files.shard, wrong if is_touched else problems + wrong, is_touched=is_touched)


def _check_bytes(
    files: ShardFiles, entries: Entries | None, bad_index: list[Problem], meter: Meter, *, decode: bool, repair: bool
) -> _Findings:
    """Read a shard; where its bytes are those that were indexed, and its index says otherwise, the index is wrong."""
    seen = walk(files, entries or (), meter.watch(storage.stream(files.url)), decode=decode)
    is_same = seen.sha256 == files.shard.sha256
    if not is_same:
        problems = seen.problems if entries is not None else bad_index
        return _Findings(files.shard, [*problems, _other(files)] if problems is bad_index or not problems else problems)
    if entries is not None and not seen.problems:
        return _Findings(_with_checksum(files.shard, entries, repair), keys=seen.keys, is_same=True)
    scan = scan_tar(files.shard.name, storage.stream(files.url))
    right = parse_sidecar(scan.entries)
    if right == entries:
        shard = _with_checksum(files.shard, entries, repair)
        return _Findings(shard, seen.problems, keys=seen.keys, is_same=True)
    repaired = []
    if repair:
        storage.write(files.sidecar_url, bytes(scan.entries))
        repaired, bad_index = [files.shard.sidecar], []
    else:
        bad_index = bad_index or [files.problem(f"its index {files.shard.sidecar} is damaged; --repair makes it again")]
    seen = walk(files, right, storage.stream(files.url), decode=decode)
    return _Findings(
        _with_checksum(files.shard, right, repair), bad_index + seen.problems, repaired, seen.keys, is_same=True
    )


def _with_checksum(shard: Shard, entries: Entries, repair: bool) -> Shard:
    """Record the checksum of a sidecar that fits its shard: that of the manifest may be missing, or damaged."""
    return replace(shard, sidecar_crc=sidecar_crc(pack_sidecar(entries))) if repair else shard


def _other(files: ShardFiles) -> Problem:
    return files.problem("its SHA-256 is not that of the manifest: copy it again, or index again")


def _settle_version(files: ShardFiles, findings: _Findings, changed: list[Problem], repair: bool) -> _Findings:
    """Decide about a shard that was touched: its contents may be the same."""
    if not changed:
        return findings
    if findings.is_same and storage.local_path(files.url) is not None and not repair:
        return replace(findings, is_touched=True)  # of local shards nobody asks for the time of change
    if not (findings.is_same and repair):
        return replace(findings, problems=changed + findings.problems)
    shard = replace(findings.shard, version=storage.info(files.url).version)
    return replace(findings, shard=shard, repaired=[*findings.repaired, files.shard.name])


def _record_versions(url: str, manifest: Manifest, findings: Sequence[_Findings]) -> None:
    shards = tuple(found.shard for found in findings)
    if shards != manifest.shards:
        write_manifest(url, replace(manifest, shards=shards))


def _unknown_tars(url: str, manifest: Manifest) -> list[Problem]:
    """Find tars that lie beside the dataset's; none where a pattern chose them, or nothing can be listed."""
    folder = manifest.base or url
    source = str(manifest.info.get("source", ""))
    if "recipe" not in manifest.info and storage.base_folder(source) != source:
        return []
    try:
        names = storage.list_tars(folder)
    except StorageError:
        raise
    except (OSError, NotImplementedError, DataError):  # a store that lists nothing, such as plain HTTP
        return []
    known = {shard.name for shard in manifest.shards}
    reason = "not in the manifest: its samples are never read; index again, or move it elsewhere"
    return [Problem(name, -1, "", "", reason) for name in names if name not in known]


def _repeated(files: Sequence[ShardFiles], keys: Sequence[array[int]]) -> list[Problem]:
    found = repeated_keys(keys)
    problems = []
    for shard, sample in found[:_LISTED]:
        key, _ = read_sample(files[shard].url, files[shard].sidecar_url, sample)
        problems.append(
            files[shard].problem(f"{DUPLICATE}: a sample of an earlier shard has it", sample=sample, key=key)
        )
    if len(found) > _LISTED:
        problems.append(Problem("", -1, "", "", f"{len(found):,} samples have the key of one in an earlier shard"))
    return problems
