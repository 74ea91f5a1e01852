"""The files that make up the code that runs here: those of a checkout as git knows them, or installed packages."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from orchestrate.errors import RunDirError

PACKAGES = ("orchestrate", "ssl_methods")
# What a build leaves beside the sources, which git ignores.
_BUILT = "ssl_methods/*.so"
# Larger files that git does not track are data, and so are many.
_LARGEST_UNTRACKED_BYTES = 5_000_000
_MOST_UNTRACKED_BYTES, _MOST_UNTRACKED_FILES = 200_000_000, 5_000
# What marks a folder that holds no code of the user's: results of ours, a virtual environment.
_MARKS = ("store.sqlite", "pyvenv.cfg")
_GIT_SECONDS = 60
_SUBMODULE = "160000"


@dataclass(frozen=True)
class Source:
    """Where the code lies, and what makes it up, by names relative to `root`.

    Attributes:
        root: absolute folder.
        files: names of the files, in order.
        links: what symbolic links that point to files or folders of the code say, relative to where each lies.
        untracked: those of the files and links that git does not track.
        commit, dirty: what is checked out, and whether the files differ from it; None without git.
        left_out: what a person may miss, in words.
    """

    root: Path
    files: tuple[str, ...]
    links: Mapping[str, str]
    untracked: tuple[str, ...]
    commit: str | None
    dirty: bool
    left_out: tuple[str, ...] = ()

    def patch(self) -> Iterator[bytes]:
        """Yield how the files differ from the commit, those that git does not track included."""
        if self.commit:
            yield _listing(self.root, "diff", "--no-ext-diff", "--binary", "HEAD", "--", ".")
        for name in self.untracked:
            words = ("diff", "--no-ext-diff", "--no-index", "--binary", "--", os.devnull, name)
            yield _git(self.root, *words, fine=(0, 1)) or b""  # unless it is gone again


def find_source(root: Path, runs: Path) -> Source:
    """List the files of a checkout but those in `runs`, or the packages alone where git knows nothing of them.

    Raises:
        RunDirError: git does not answer, or there is too much that it does not track.
    """
    if _git(root, "ls-files", "--error-unmatch", f"{PACKAGES[0]}/__init__.py") is None:
        found = (path for package in PACKAGES for path in (root / package).rglob("*"))
        sources = (path for path in found if "__pycache__" not in path.parts)
        return Source(root, tuple(sorted(_relative(root, sources))), {}, (), commit=None, dirty=False)
    tracked, submodules = _tracked(root)
    untracked, left_out = _untracked(root, runs)
    names = {*tracked, *untracked, *_relative(root, root.glob(_BUILT))}
    links = _links(root, names)
    files = tuple(sorted(name for name in names - links.keys() if (root / name).is_file()))
    own = tuple(name for name in untracked if name in links or name in files)
    astray = [name for name in names - links.keys() if (root / name).is_symlink() and name not in files]
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip() or None
    return Source(
        root,
        files,
        links,
        own,
        commit,
        dirty=bool(own) or _git(root, "diff", "--quiet", "HEAD", "--", ".") is None,
        left_out=(
            *_told("submodule", submodules),
            *left_out,
            *_told("link that leads out of the code", astray),
        ),
    )


def _tracked(root: Path) -> tuple[list[str], list[str]]:
    """Return the names of what git tracks, and those of submodules."""
    kinds = {}
    for line in _lines(_listing(root, "ls-files", "-z", "--stage")):
        facts, _, name = line.partition("\t")
        kinds[name] = facts.partition(" ")[0]
    submodules = [name for name, mode in kinds.items() if mode == _SUBMODULE]
    return [name for name, mode in kinds.items() if mode != _SUBMODULE], submodules


def _untracked(root: Path, runs: Path) -> tuple[tuple[str, ...], list[str]]:
    """List the files that git neither tracks nor ignores and that may be code; also say which of them are too large.

    Raises:
        RunDirError: they are too many to be code.
    """

    @cache
    def is_foreign(folder: Path) -> bool:
        own = folder == runs.absolute() or any((folder / mark).exists() for mark in _MARKS)
        return folder != root and (own or is_foreign(folder.parent))

    others = _lines(_listing(root, "ls-files", "-z", "--others", "--exclude-standard"))
    sizes = {name: _size(root / name) for name in others if not is_foreign((root / name).parent)}
    names = tuple(name for name, size in sizes.items() if 0 <= size < _LARGEST_UNTRACKED_BYTES)
    total = sum(sizes[name] for name in names)
    if total > _MOST_UNTRACKED_BYTES or len(names) > _MOST_UNTRACKED_FILES:
        raise RunDirError(
            f"{root}: {len(names)} files of {total / 1e6:.0f} MB that git does not track would be copied with the "
            f"code, such as {names[0]}; list their folders in .gitignore, or write `code: live` in the cluster file"
        )
    large = [name for name, size in sizes.items() if size >= _LARGEST_UNTRACKED_BYTES]
    inner = [name for name in sizes if name.endswith("/") and not is_foreign(root / name)]
    return names, [
        *_told(f"untracked file over {_LARGEST_UNTRACKED_BYTES / 1e6:.0f} MB", large),
        *_told("checkout inside this one", inner),
    ]


def _size(path: Path) -> int:
    """Return the length of a file; -1 if it is none, or is gone since it was listed."""
    try:
        return path.stat().st_size if path.is_file() else 0 if path.is_symlink() else -1
    except OSError:
        return -1


def _links(root: Path, names: set[str]) -> dict[str, str]:
    """Return the links to other files and folders of the code, as they must read in a copy of it."""
    folders = {str(parent) for name in names for parent in Path(name).parents}
    links = {}
    for name in names:
        path = root / name
        if path.is_symlink() and (target := _inside(root, path)) is not None and target in names | folders:
            links[name] = os.path.relpath(target, Path(name).parent)
    return links


def _inside(root: Path, link: Path) -> str | None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # it points nowhere, or in a circle
        return None
    return str(target.relative_to(root.resolve())) if target.is_relative_to(root.resolve()) else None


def _told(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{what}: {shown}"]


def _relative(root: Path, paths: Iterable[Path]) -> Iterator[str]:
    return (str(path.relative_to(root)) for path in paths if path.is_file())


def _lines(answer: bytes) -> list[str]:
    return [os.fsdecode(name) for name in answer.split(b"\0") if name]


def _listing(root: Path, *words: str) -> bytes:
    """Ask git what it must know."""
    answer = _git(root, *words)
    if answer is None:
        raise RunDirError(
            f"{root}: `git {' '.join(words)}` failed, so the code cannot be copied; see what it says there, or write "
            "`code: live` in the cluster file"
        )
    return answer


def _git(root: Path, *words: str, fine: tuple[int, ...] = (0,)) -> bytes | None:
    """Ask git about a folder; None if it does not answer, or says no."""
    # Git may refresh its index on a question, which somebody else's command would trip over.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    # Git distrusts a checkout of another user, as it may name programs to run; its code runs here already.
    command = ("git", "-c", "safe.directory=*", *words)
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, env=environment, timeout=_GIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunDirError(
            f"{root}: `git {' '.join(words)}` took more than {_GIT_SECONDS} s; is its disk slow? try again, or write "
            "`code: live` in the cluster file"
        ) from error
    except OSError:
        return None
    return answer.stdout if answer.returncode in fine else None
