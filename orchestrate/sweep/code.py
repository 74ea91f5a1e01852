"""The code that trials run: a frozen copy, so that editing the checkout changes no trial that waits or goes on.

runs/code/<digest>/
    tree/            what `orchestrate` was imported from; workers import from here; shared by trials
    COMMIT           what was checked out
    diff.patch       how the tree differs from that, files that git does not track included
    manifest.json    every file with its size and SHA-256
RunDir/code.json     which copy a trial runs: that of its first submission, so that resumed equals uninterrupted

A copy is whole or absent: it is written aside and renamed. Nothing removes one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orchestrate
from orchestrate.errors import RunDirError
from orchestrate.runs import RunDir, read_json, write_json

PACKAGES = ("orchestrate", "ssl_methods")
# What a build leaves beside the sources, which git ignores.
_BUILT = "ssl_methods/*.so"
# Larger files that git does not track are data, and so are many.
_LARGEST_UNTRACKED_BYTES = 5_000_000
_MOST_UNTRACKED_BYTES, _MOST_UNTRACKED_FILES = 200_000_000, 5_000
# What marks a folder that holds no code of the user's: results of ours, a virtual environment.
_MARKS = ("store.sqlite", "pyvenv.cfg")
_DIGITS = 12
_GIT_SECONDS = 60


@dataclass(frozen=True)
class FrozenCode:
    """A copy of the code.

    Attributes:
        digest: of paths, contents and commit; 12 hex.
        path: absolute folder to import from.
        commit: that was checked out; None without git.
        dirty: whether files differed from the commit, or were not tracked.
    """

    digest: str
    path: Path
    commit: str | None
    dirty: bool

    def __str__(self) -> str:
        """Name the copy for people."""
        origin = f"commit {self.commit[:10]}" if self.commit else "an installed package"
        return f"{self.digest}, {origin}{' with changes' if self.dirty else ''}"


@dataclass(frozen=True)
class _Source:
    """Where the code lies, and the files that make it up, relative to `root`."""

    root: Path
    files: tuple[str, ...]
    untracked: tuple[str, ...]
    commit: str | None
    dirty: bool


def checkout() -> Path:
    """Return the folder that this program's packages are imported from."""
    return Path(orchestrate.__file__).resolve().parents[1]


def plan_freeze(runs: Path, *, root: Path | None = None) -> FrozenCode:
    """Say which copy `freeze` would make, writing nothing.

    Raises:
        RunDirError: the code cannot be read.
    """
    source = _source(root or checkout(), runs)
    return _described(runs, source, {name: _facts(source.root / name) for name in source.files})


def freeze(runs: Path, *, root: Path | None = None) -> FrozenCode:
    """Copy the code that runs here to the runs folder, unless that copy is there already.

    Args:
        runs: folder that gets `code/`.
        root: folder of the packages; `checkout()` if not given.

    Raises:
        RunDirError: it cannot be read, or the folder cannot be written.
    """
    code = plan_freeze(runs, root=root)
    if _is_whole(code.path.parent):
        return code
    try:
        return _write(runs, _source(root or checkout(), runs))
    except OSError as error:
        raise RunDirError(
            f"{code.path.parent}: cannot be written: {error.strerror}; choose another folder with --runs, "
            "or write `code: live` in the cluster file"
        ) from error


def code_of(run: RunDir) -> FrozenCode | None:
    """Return the copy that a trial runs; None if it has none yet, or that is gone."""
    noted = read_json(run.code_file)
    if noted is None:
        return None
    path = _folder(run.path.parents[1], str(noted["digest"])) / "tree"
    return FrozenCode(noted["digest"], path, noted["commit"], bool(noted["dirty"])) if path.is_dir() else None


def code_for(run: RunDir, current: FrozenCode) -> FrozenCode:
    """Return the copy that the next attempt of a trial runs: its own, else `current`, which becomes its own.

    For the controller when it submits: `RunSpec.code` is the path of what this returns.
    """
    own = code_of(run)
    if own is None:
        _note(run, current)
    return own or current


def renew_code(run: RunDir, current: FrozenCode) -> FrozenCode | None:
    """Let a trial that has begun go on with `current`, as a person asks; return what it ran, None if that is the same.

    An attempt that is under way keeps what it has.
    """
    own = code_of(run)
    if own is None or own.digest == current.digest:
        return None
    _note(run, current)
    return own


def _note(run: RunDir, code: FrozenCode) -> None:
    facts = {key: value for key, value in asdict(code).items() if key != "path"}
    write_json(run.code_file, {**facts, "time": time.time()})


def _folder(runs: Path, digest: str) -> Path:
    return runs.absolute() / "code" / digest


def _source(root: Path, runs: Path) -> _Source:
    """List the files of a checkout but those in `runs`, or the packages alone where git knows nothing of them."""
    if _git(root, "ls-files", "--error-unmatch", f"{PACKAGES[0]}/__init__.py") is None:
        found = (path for package in PACKAGES for path in (root / package).rglob("*"))
        sources = (path for path in found if "__pycache__" not in path.parts)
        return _Source(root, tuple(sorted(_relative(root, sources))), (), commit=None, dirty=False)
    tracked = _lines(_git(root, "ls-files", "-z"))
    untracked = _untracked(root, runs)
    built = _relative(root, root.glob(_BUILT))
    files = {name for name in (*tracked, *untracked, *built) if (root / name).is_file()}
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip() or None
    dirty = bool(untracked) or _git(root, "diff", "--quiet", "HEAD", "--", ".") is None
    return _Source(root, tuple(sorted(files)), untracked, commit, dirty)


def _untracked(root: Path, runs: Path) -> tuple[str, ...]:
    """List the files that git neither tracks nor ignores, and that may be code.

    Raises:
        RunDirError: they are too many to be code.
    """

    @cache
    def is_foreign(folder: Path) -> bool:
        own = folder == runs.absolute() or any((folder / mark).exists() for mark in _MARKS)
        return folder != root and (own or is_foreign(folder.parent))

    others = _lines(_git(root, "ls-files", "-z", "--others", "--exclude-standard"))
    names = tuple(name for name in others if not is_foreign((root / name).parent) and _is_small(root / name))
    size = sum((root / name).stat().st_size for name in names)
    if size > _MOST_UNTRACKED_BYTES or len(names) > _MOST_UNTRACKED_FILES:
        raise RunDirError(
            f"{root}: {len(names)} files of {size / 1e6:.0f} MB that git does not track would be copied with the code, "
            f"such as {names[0]}; list their folders in .gitignore, or write `code: live` in the cluster file"
        )
    return names


def _relative(root: Path, paths: Iterable[Path]) -> Iterator[str]:
    return (str(path.relative_to(root)) for path in paths if path.is_file())


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < _LARGEST_UNTRACKED_BYTES


def _git(root: Path, *words: str, fine: tuple[int, ...] = (0,)) -> bytes | None:
    """Ask git about a folder; None if it does not answer, or says no."""
    # Git may refresh its index on a question, which somebody else's command would trip over.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ("git", *words)
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, env=environment, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode in fine else None


def _lines(answer: bytes | None) -> list[str]:
    return [os.fsdecode(name) for name in (answer or b"").split(b"\0") if name]


def _facts(path: Path) -> dict[str, Any]:
    """Describe a file: its SHA-256, size, and whether it is a program."""
    try:
        content = path.read_bytes()
        return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "program": _is_program(path)}
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}; is somebody editing the checkout?") from error


def _is_program(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXUSR)


def _described(runs: Path, source: _Source, files: Mapping[str, Mapping[str, Any]]) -> FrozenCode:
    text = json.dumps([source.commit, source.dirty, sorted(files.items())], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return FrozenCode(digest, _folder(runs, digest) / "tree", source.commit, source.dirty)


def _is_whole(folder: Path) -> bool:
    """Tell whether a copy has every file in its length, which a lost disk or a tidy person may have changed."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        return False
    try:
        return all(
            (folder / "tree" / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items()
        )
    except OSError:
        return False


def _write(runs: Path, source: _Source) -> FrozenCode:
    aside = runs.absolute() / "code" / f".tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in source.files:
            _copy(source.root / name, aside / "tree" / name)
        # What was copied counts: somebody may have saved a file since the list was made.
        files = {name: _facts(aside / "tree" / name) for name in source.files}
        code = _described(runs, source, files)
        (aside / "COMMIT").write_text(f"{source.commit or 'no git'}{', with changes' if source.dirty else ''}\n")
        (aside / "diff.patch").write_bytes(b"".join(_patch(source)))
        facts = {"digest": code.digest, "commit": code.commit, "dirty": code.dirty, "source": str(source.root)}
        write_json(aside / "manifest.json", {**facts, "created": time.time(), "files": files})
        _put_in_place(aside, code.path.parent)
        return code
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o555 if _is_program(source) else 0o444)


def _patch(source: _Source) -> Iterator[bytes]:
    if source.commit:
        yield _git(source.root, "diff", "--binary", "HEAD", "--", ".") or b""
    for name in source.untracked:
        yield _git(source.root, "diff", "--no-index", "--binary", "--", os.devnull, name, fine=(0, 1)) or b""


def _put_in_place(aside: Path, folder: Path) -> None:
    if folder.exists() and not _is_whole(folder):
        damaged = aside.with_name(f"{aside.name}-damaged")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if not _is_whole(folder):  # else another command was faster
            raise
