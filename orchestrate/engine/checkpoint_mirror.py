"""A second home of a trial's checkpoints, at any URL that fsspec knows.

Files go up first and the manifest last; before a removal the manifest goes first. So whatever has a good manifest there
was whole once, and a reader that verifies what it downloads takes no half.
"""

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrate.checkpoint_files import (
    MANIFEST,
    checked,
    find_gap,
    list_checkpoints,
    newest_first,
    plan_removal,
)
from orchestrate.errors import CheckpointError


class Mirror:
    """The checkpoints of one folder, kept at a URL as well; used by rank 0.

    Args:
        folder: the checkpoints of a RunDir; they lie at `<url>/<name of the RunDir>/checkpoints`.
        keep: how many stay there beside the milestones.

    Attributes:
        delays_seconds: pauses between the tries of an upload.
        busy_with: checkpoint that is being uploaded, which must not be removed meanwhile; empty if there is none.
    """

    delays_seconds: tuple[float, ...] = (1.0, 4.0, 16.0)

    def __init__(self, url: str, folder: Path, *, keep: int, say: Callable[[str], None]) -> None:
        self.url = f"{url.rstrip('/')}/{folder.absolute().parent.name}/checkpoints"
        self.busy_with = ""
        self._folder, self._keep, self._say = folder, keep, say
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self._upload: Future[str] | None = None
        self._known: dict[str, bytes] = {}  # manifests that are known to be there

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec  # here, because most trainings never need it

        store, path = fsspec.core.url_to_fs(self.url)
        return store, path.rstrip("/")

    def names(self) -> list[str]:
        """List the checkpoints there, newest first; half an upload, which has no manifest yet, does not count.

        Raises:
            CheckpointError: the store cannot be asked.
        """
        try:
            store, base = self._place
            return [name for name in self._names() if store.exists(f"{base}/{name}/{MANIFEST}")]
        except Exception as error:  # whatever a client of some store raises
            raise CheckpointError(f"{self.url}: cannot be read: {_told(error)}") from error

    def _names(self) -> list[str]:
        store, base = self._place
        store.invalidate_cache()
        try:
            paths = store.ls(base, detail=False)
        except FileNotFoundError:
            return []
        return newest_first(str(path).rstrip("/").rpartition("/")[2] for path in paths)

    def fetch(self, name: str, aside: Path) -> None:
        """Download a checkpoint into a new folder; whether it is whole is for the caller to find out.

        Raises:
            CheckpointError: the store cannot be read, or holds no good manifest of it.
        """
        store, base = self._place
        aside.mkdir(parents=True)
        try:
            text = _read(store, f"{base}/{name}/{MANIFEST}")
            manifest = None if text is None else _parse(text)
            if manifest is None:
                raise CheckpointError(f"{self.url}/{name}: {MANIFEST} is missing, damaged or of another format")
            for file in (*manifest["files"], MANIFEST):
                store.get_file(f"{base}/{name}/{file}", str(aside / file))
        except CheckpointError:
            raise
        except Exception as error:  # whatever a client of some store raises
            raise CheckpointError(f"{self.url}/{name}: cannot be read: {_told(error)}") from error

    def push(self) -> None:
        """Begin to bring the store up to date with the folder; a call that waits its turn is as good as two."""
        if self._upload is not None:
            self._upload.cancel()
        self._upload = self._executor.submit(self._bring_up_to_date)

    def finish(self) -> str:
        """Wait until the store is up to date with the folder; say what is wrong if it cannot be, else nothing."""
        self.push()
        return self._upload.result() if self._upload is not None else ""

    def _bring_up_to_date(self) -> str:
        problem = ""
        for delay in (*self.delays_seconds, None):
            try:
                self._synchronise()
                return ""
            except Exception as error:  # whatever a client of some store raises
                problem = f"{self.url}: a checkpoint could not be uploaded: {_told(error)}"
            finally:
                self.busy_with = ""
            if delay is not None:
                time.sleep(delay)
        self._say(f"{problem}; training goes on, its checkpoints lie in {self._folder}")
        return problem

    def _synchronise(self) -> None:
        """Upload what is missing there, the newest first, then remove what has served its time."""
        whole = [path for path in list_checkpoints(self._folder) if not find_gap(path)]
        for path in whole:
            self._put(path)
        if whole:
            self._prune(whole[0].name)

    def _put(self, checkpoint: Path) -> None:
        store, base = self._place
        there = f"{base}/{checkpoint.name}"
        self.busy_with = checkpoint.name
        try:
            manifest = (checkpoint / MANIFEST).read_bytes()
            if self._known.get(checkpoint.name) == manifest or _read(store, f"{there}/{MANIFEST}") == manifest:
                self._known[checkpoint.name] = manifest
                return
            with contextlib.suppress(FileNotFoundError):
                store.rm_file(f"{there}/{MANIFEST}")
            _make_folders(store, there, levels=4)  # the last one of the URL, the RunDir, checkpoints, the step
            for file in (*json.loads(manifest)["files"], MANIFEST):
                store.put_file(str(checkpoint / file), f"{there}/{file}")
            self._known[checkpoint.name] = manifest
        except FileNotFoundError:
            if checkpoint.exists():
                raise
            # Removed in the folder meanwhile: nobody wants it any more.

    def _prune(self, newest: str) -> None:
        store, base = self._place
        manifests = {name: _read(store, f"{base}/{name}/{MANIFEST}") for name in self._names()}
        halves = {name: False for name, text in manifests.items() if text is None}
        good = {name: _parse(text) for name, text in manifests.items() if text is not None}
        milestones = {name: bool(manifest["milestone"]) for name, manifest in good.items() if manifest is not None}
        doomed = plan_removal(milestones, keep=self._keep, newest=newest)
        for name in (*doomed, *plan_removal(halves, keep=0, newest=newest)):
            self._known.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                store.rm_file(f"{base}/{name}/{MANIFEST}")
            with contextlib.suppress(FileNotFoundError):
                store.rm(f"{base}/{name}", recursive=True)


def _read(store: Any, path: str) -> bytes | None:
    try:
        data: bytes = store.cat_file(path)
    except FileNotFoundError:
        return None
    return data


def _make_folders(store: Any, path: str, *, levels: int) -> None:
    """Make the last levels of a path as folders, never a bucket: a misspelt name must stay an error."""
    parts = path.rstrip("/").split("/")
    for end in range(len(parts) - levels, len(parts)):
        folder = "/".join(parts[: end + 1])
        if "/" in folder.strip("/"):
            # Object stores have no folders, and some refuse to make any; the upload that follows tells of real trouble.
            with contextlib.suppress(OSError, NotImplementedError):
                store.mkdir(folder, create_parents=False)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        return checked(json.loads(text))
    except ValueError:
        return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
