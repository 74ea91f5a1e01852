"""What a checkpoints folder holds, told from its files alone: no tensor is read here.

checkpoints/step-00000120/
    model.safetensors       parameters and buffers of the whole method (twins, queues, centres)
    optimizer.safetensors   optimizer state by parameter name
    ranks.safetensors       random-number state of every rank
    manifest.json           step, samples seen, fingerprint, world size, files with size and SHA-256; written last
checkpoints/latest.json     names the newest one for people and tools; moves after its rename

A reader trusts nothing without a manifest that verifies.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrate.runs import read_json

FORMAT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{8,}")


def name_of(step: int) -> str:
    """Name the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, whole or not, newest first."""
    return [folder / name for name in newest_first(path.name for path in folder.glob("step-*"))]


def newest_first(names: Iterable[str]) -> list[str]:
    """Sort the names of checkpoints among others by step."""
    return sorted(filter(_NAME.fullmatch, names), key=step_of, reverse=True)


def step_of(name: str) -> int:
    """Return the step that a checkpoint is named after."""
    return int(name.removeprefix("step-"))


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add the hash of everything a manifest says, so that a flipped digit in it is damage as well."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "seal"}, sort_keys=True)
    return {**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(manifest: Mapping[str, Any] | None) -> bool:
    """Tell whether a manifest is the one that was written, of whatever format."""
    return manifest is not None and "seal" in manifest and manifest["seal"] == sealed(manifest)["seal"]


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint, or None if it is missing, damaged, or of another format."""
    return checked(read_json(checkpoint / MANIFEST))


def checked(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a manifest that can be trusted, None for any other; none may name a file outside of its folder."""
    if manifest is None or not is_sealed(manifest) or manifest.get("format") != FORMAT:
        return None
    return manifest if all(Path(file).name == file for file in manifest["files"]) else None


def other_format(checkpoint: Path) -> int | None:
    """Return the format of a checkpoint that another version wrote; None for a damaged one, or one of this version."""
    manifest = read_json(checkpoint / MANIFEST)
    if manifest is None or not is_sealed(manifest) or manifest.get("format") == FORMAT:
        return None
    return int(manifest.get("format", 0))


def find_damage(checkpoint: Path, *, name: str = "") -> str:
    """Say what is wrong with a checkpoint; empty if it is whole.

    Args:
        checkpoint: its folder.
        name: what the folder should be called, if it is not called so yet.
    """
    gap = find_gap(checkpoint, name=name)
    if gap:
        return gap
    files = (read_manifest(checkpoint) or {})["files"]
    broken = [file for file, facts in files.items() if _sha256(checkpoint / file) != facts["sha256"]]
    return f"{broken[0]} fails its SHA-256" if broken else ""


def find_gap(checkpoint: Path, *, name: str = "") -> str:
    """Say what shows to be wrong with a checkpoint without reading its tensors; see `find_damage`."""
    manifest = read_manifest(checkpoint)
    if manifest is None or name_of(manifest["step"]) != (name or checkpoint.name):
        return f"{MANIFEST} is missing, damaged or of another format"
    for file, facts in manifest["files"].items():
        path = checkpoint / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{file} has {path.stat().st_size} bytes, not {facts['bytes']}"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_removal(milestones: Mapping[str, bool], *, keep: int, newest: str) -> list[str]:
    """Decide which checkpoints have served their time.

    Args:
        milestones: whether each checkpoint that has a good manifest is kept for ever.
        keep: how many of the others stay, counted from `newest` back.
        newest: the one just written. Later ones are of an overtaken attempt; they stay until they are made again.
    """
    passing = newest_first(name for name, is_milestone in milestones.items() if not is_milestone)
    return [name for name in passing if step_of(name) <= step_of(newest)][keep:]


def milestones_of(checkpoints: Iterable[Path]) -> dict[str, bool]:
    """Read which checkpoints are kept for ever; those without a good manifest are left out."""
    manifests = {path.name: read_manifest(path) for path in checkpoints}
    return {name: bool(manifest["milestone"]) for name, manifest in manifests.items() if manifest is not None}
