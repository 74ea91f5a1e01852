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
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orchestrate
from orchestrate.errors import RunDirError
from orchestrate.runs import RunDir, read_json, write_json
from orchestrate.sweep.code_source import Source, find_source

_DIGITS = 12


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


def checkout() -> Path:
    """Return the folder that this program's packages are imported from."""
    return Path(orchestrate.__file__).resolve().parents[1]


def plan_freeze(runs: Path, *, root: Path | None = None) -> FrozenCode:
    """Say which copy `freeze` would make, writing nothing.

    Raises:
        RunDirError: the code cannot be read.
    """
    return _planned(runs, find_source(root or checkout(), runs))


def freeze(runs: Path, *, root: Path | None = None, say: Callable[[str], None] = lambda text: None) -> FrozenCode:
    """Copy the code that runs here to the runs folder, unless that copy is there already.

    A file that vanishes meanwhile, as of an editor or a build, is left out.

    Args:
        runs: folder that gets `code/`.
        root: folder of the packages; `checkout()` if not given.
        say: called with what a new copy leaves out of a checkout.

    Raises:
        RunDirError: it cannot be read, or the folder cannot be written.
    """
    source = find_source(root or checkout(), runs)
    code = _planned(runs, source)
    if _is_whole(code.path.parent):
        return code
    try:
        code = _write(runs, source)
    except OSError as error:
        raise RunDirError(
            f"{code.path.parent}: cannot be written: {error.strerror}; choose another folder with --runs, "
            "or write `code: live` in the cluster file"
        ) from error
    if source.left_out:
        say(f"the frozen copy of the code leaves out: {'; '.join(source.left_out)}")
    return code


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


def _planned(runs: Path, source: Source) -> FrozenCode:
    contents = ((name, _content(source.root / name)) for name in source.files)
    return _described(runs, source, {name: _facts(*content) for name, content in contents if content is not None})


def _content(path: Path) -> tuple[bytes, bool] | None:
    """Return what is in a file, and whether it is a program; None if it is no file any more."""
    try:
        return path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}; a copy of the code is made of it") from error


def _facts(content: bytes, is_program: bool) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "program": is_program}


def _described(runs: Path, source: Source, files: Mapping[str, Mapping[str, Any]]) -> FrozenCode:
    parts: list[Any] = [source.commit, source.dirty, sorted(files.items())]
    text = json.dumps([*parts, source.links] if source.links else parts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return FrozenCode(digest, _folder(runs, digest) / "tree", source.commit, source.dirty)


def _is_whole(folder: Path) -> bool:
    """Tell whether a copy has every file in its length, which a lost disk or a tidy person may have changed."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        return False
    tree = folder / "tree"
    try:
        has_files = all((tree / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items())
        return has_files and all(str((tree / n).readlink()) == to for n, to in manifest.get("links", {}).items())
    except OSError:
        return False


def _write(runs: Path, source: Source) -> FrozenCode:
    aside = runs.absolute() / "code" / f".tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "tree").mkdir(parents=True)
        # What is copied counts: somebody may have saved or removed a file since the list was made.
        files = {}
        for name in source.files:
            if (content := _content(source.root / name)) is not None:
                _put(aside / "tree" / name, *content)
                files[name] = _facts(*content)
        for name, to in source.links.items():
            (aside / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / "tree" / name).symlink_to(to)
        code = _described(runs, source, files)
        (aside / "COMMIT").write_text(f"{source.commit or 'no git'}{', with changes' if source.dirty else ''}\n")
        (aside / "diff.patch").write_bytes(b"".join(source.patch()))
        facts = {"digest": code.digest, "commit": code.commit, "dirty": code.dirty, "source": str(source.root)}
        contents = {"files": files, "links": dict(source.links)}
        write_json(aside / "manifest.json", {**facts, "created": time.time(), **contents})
        _put_in_place(aside, code.path.parent)
        return code
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(target: Path, content: bytes, is_program: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(0o555 if is_program else 0o444)


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
