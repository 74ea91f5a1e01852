"""Put a checkpoint into its folder so that a kill at any moment leaves all the others, and this one whole or absent."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from orchestrate.checkpoint_files import (
    FORMAT,
    MANIFEST,
    list_checkpoints,
    milestones_of,
    name_of,
    plan_removal,
    sealed,
)
from orchestrate.engine.snapshot import Tensors
from orchestrate.engine.tensor_file import write_tensors
from orchestrate.runs import sync_folder, write_json

# What is being written, and what is being removed.
ASIDE, GONE = ".tmp-", ".old-"
LATEST = "latest.json"


def publish(folder: Path, files: Mapping[str, Tensors], facts: Mapping[str, Any]) -> str:
    """Write a checkpoint aside, sync it, give it its name, and return that; `latest.json` moves last.

    Args:
        folder: of the checkpoints.
        files: tensors of each file.
        facts: what the manifest says beside format and files; `step` names the checkpoint.

    Raises:
        OSError: it could not be written; what there was before is untouched.
    """
    name = name_of(facts["step"])
    aside = new_aside(folder, name)
    try:
        aside.mkdir(parents=True)
        written = {file: write_tensors(aside / file, tensors) for file, tensors in files.items()}
        write_json(aside / MANIFEST, sealed({"format": FORMAT, **facts, "files": written}))
        put_in_place(aside, folder / name)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    write_json(folder / LATEST, {"checkpoint": name})
    return name


def new_aside(folder: Path, name: str) -> Path:
    """Return a path beside the checkpoints that nothing has, for one that is not whole yet."""
    aside = folder / f"{ASIDE}{name}"
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def put_in_place(aside: Path, target: Path) -> None:
    """Give a finished folder its name; what has that name already is damaged or overtaken, and is set aside."""
    sync_folder(aside)
    if target.exists():
        target.rename(_free_name(target))
    aside.rename(target)
    sync_folder(target.parent)


def prune(folder: Path, *, keep: int, newest: str, spare: Collection[str] = ()) -> None:
    """Remove the checkpoints that have served their time, and what kills have left; `spare` names some to leave."""
    doomed = plan_removal(milestones_of(list_checkpoints(folder)), keep=keep, newest=newest)
    for name in doomed:
        if name not in spare:
            # Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint.
            (folder / name).rename(_free_name(folder / name))
    for path in folder.iterdir():
        if path.name.startswith((ASIDE, GONE)):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{LATEST}.*"):  # half of one, see `write_text`
        path.unlink(missing_ok=True)


def _free_name(target: Path) -> Path:
    """Return a name for what is set aside that nothing has, so that a rename overwrites nothing."""
    names = (target.with_name(f"{GONE}{target.name}-{number}") for number in range(10**6))
    return next(name for name in names if not name.exists())
