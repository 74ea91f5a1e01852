"""Find the checkpoint to go on from: the newest whole one, in the folder or at the URL."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.checkpoint_files import (
    FORMAT,
    find_damage,
    list_checkpoints,
    newest_first,
    other_format,
    read_manifest,
)
from orchestrate.engine.checkpoint_mirror import Mirror
from orchestrate.engine.checkpoint_publish import new_aside, put_in_place
from orchestrate.errors import CheckpointError


@dataclass(frozen=True)
class Search:
    """A look at every place where checkpoints of a trial may lie; for rank 0.

    Attributes:
        folder: of the checkpoints.
        mirror: the URL they are kept at as well.
        trials: fingerprint of the trial, then of the one it continues.
        say: tells of damaged ones.
    """

    folder: Path
    mirror: Mirror | None
    trials: tuple[str, ...]
    say: Callable[[str], None]

    def newest(self) -> dict[str, Any] | None:
        """Return the manifest of the newest whole checkpoint, which then lies in the folder; None if there is none.

        Raises:
            CheckpointError: see `CheckpointStore.load_newest`.
        """
        here = [path.name for path in list_checkpoints(self.folder)]
        there = self._names_there(bool(here))
        names = newest_first({*here, *there})
        for name in names:
            if (name in here and self._is_whole(name)) or (name in there and self._fetch(name)):
                return self._of_this_trial(name)
        if names:
            raise CheckpointError(
                f"{self.folder}: none of {len(names)} checkpoints is whole; delete the folder to start afresh"
            )
        if len(self.trials) > 1:
            raise CheckpointError(
                f"{self.folder}: no checkpoint of the trial {self.trials[1]}, which this one continues; "
                "`orchestrate resume` brings it here"
            )
        return None

    def _names_there(self, any_here: bool) -> list[str]:
        if self.mirror is None:
            return []
        try:
            return self.mirror.names()
        except CheckpointError as error:
            if not any_here:
                raise  # it may hold what would be trained a second time
            self.say(f"{error}; the checkpoints in {self.folder} are taken")
            return []

    def _is_whole(self, name: str) -> bool:
        path = self.folder / name
        old = other_format(path)
        if old is not None:
            raise CheckpointError(
                f"{path}: is of checkpoint format {old}, this version reads {FORMAT}; "
                "go on with the version that wrote it, or delete the folder to start afresh"
            )
        damage = find_damage(path)
        if damage:
            self.say(f"{path}: damaged, skipped: {damage}")
        return not damage

    def _fetch(self, name: str) -> bool:
        """Download a checkpoint, and say so; one that is damaged or cannot be had is named and skipped."""
        assert self.mirror is not None
        aside = new_aside(self.folder, name)
        try:
            self.mirror.fetch(name, aside)
            damage = find_damage(aside, name=name)
            if damage:
                raise CheckpointError(f"{self.mirror.url}/{name}: damaged: {damage}")
            put_in_place(aside, self.folder / name)
        except (CheckpointError, OSError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            self.say(f"{error}; skipped")
            return False
        self.say(f"{self.mirror.url}/{name}: downloaded")
        return True

    def _of_this_trial(self, name: str) -> dict[str, Any]:
        manifest = read_manifest(self.folder / name)
        assert manifest is not None  # it was verified
        if manifest["fingerprint"] not in self.trials:
            raise CheckpointError(
                f"{self.folder / name}: belongs to the trial {manifest['fingerprint']}, this one is {self.trials[0]}"
            )
        return manifest
