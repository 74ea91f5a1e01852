"""Arrays: many jobs of one request, and whose job each of their elements is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrate.launchers.base import LaunchPlan
from orchestrate.launchers.slurm_queue import Row
from orchestrate.launchers.slurm_script import array_folders
from orchestrate.runs import write_text

_PREFIX = "oc-array-"


class ArrayFolders:
    """What is known of the arrays that were submitted: a folder each, written before the submission.

    Args:
        folder: absolute; holds a folder for each array.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, tuple[str, ...]] = {}

    def create(self, plans: Sequence[LaunchPlan], *, now: float) -> tuple[str, Path]:
        """Write down which jobs a new array has; return its name and its folder."""
        names = [plan.name for plan in plans]
        digest = hashlib.sha256("\n".join([*names, repr(now)]).encode()).hexdigest()
        name = f"{_PREFIX}{digest[:16]}"
        folder = self._folder / name
        write_text(folder / "names.txt", "".join(f"{each}\n" for each in names))
        write_text(array_folders(folder), "".join(f"{plan.run_dir}\n" for plan in plans))
        return name, folder

    def named(self, rows: Iterable[Row]) -> list[Row]:
        """Give the elements of arrays the names of their jobs; rows of arrays that are not known are left out."""
        return [own for row in rows if (own := self._named(row)) is not None]

    def _named(self, row: Row) -> Row | None:
        if not row.name.startswith(_PREFIX):
            return row
        names, index = self._names_of(row.name), row.job.partition("_")[2]
        return replace(row, name=names[int(index)]) if index.isdigit() and int(index) < len(names) else None

    def _names_of(self, array: str) -> tuple[str, ...]:
        if not self._names.get(array):
            try:
                self._names[array] = tuple((self._folder / array / "names.txt").read_text().splitlines())
            except OSError:  # an array of another `runs`
                return ()
        return self._names[array]
