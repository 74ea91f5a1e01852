"""Checkpoints: whole or absent, verified by hash, free of pickle.

checkpoints/step-00000120/
    model.safetensors       parameters and buffers of the whole method (twins, queues, centres)      rank 0
    optimizer.safetensors   optimizer state by parameter name                                        rank 0
    rank-<r>.safetensors    random-number state of one rank                                          each rank
    manifest.json           step, samples seen, fingerprint, world size, files with size and SHA-256 rank 0, last
checkpoints/latest.json     names the newest whole one for people and tools; moves after its rename

A save is written under `.tmp-*`, synced, and renamed. A reader trusts nothing without a manifest that verifies.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrate.engine.base import Engine, OptimizerState
from orchestrate.engine.ranks import Ranks
from orchestrate.errors import CheckpointError
from orchestrate.runs import read_json, sync_folder, write_json

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a training stands: everything but tensors that the next step depends on."""

    step: int
    samples_seen: int
    fingerprint: str
    order: dict[str, Any]


class CheckpointStore:
    """The checkpoints folder of one RunDir, seen by one rank."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, say: Callable[[str], None] = print) -> None:
        self._folder, self._ranks, self._keep, self._say = folder, ranks, keep, say

    def save(self, engine: Engine, position: Position) -> Path:
        """Write a checkpoint; every rank must call it.

        Raises:
            CheckpointError: a rank could not write; nothing that existed before is touched.
        """
        name = _name_of(position.step)
        target = self._folder / name
        aside = self._folder / f".tmp-{name}"
        if self._ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self._ranks.from_main(None)  # the folder exists before any rank writes into it
        optimizer_state = engine.optimizer_state() if engine.sharded or self._ranks.is_main else {}
        written = self._attempt(lambda: self._write_files(aside, engine, optimizer_state))
        if self._ranks.is_main:
            self._publish(aside, target, position, written)
        self._ranks.from_main(None)
        return target

    def _write_files(self, aside: Path, engine: Engine, optimizer_state: OptimizerState) -> dict[str, Any]:
        files: dict[str, Mapping[str, Tensor]] = {f"rank-{self._ranks.rank}.safetensors": _random_state(self._ranks)}
        if self._ranks.is_main:
            files["model.safetensors"] = model_state(engine.method)
            files["optimizer.safetensors"] = _flatten(optimizer_state)
        return {name: _write_tensors(aside / name, tensors) for name, tensors in files.items()}

    def _attempt(self, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Let every rank write; if one fails, all of them raise."""
        try:
            result: dict[str, Any] = {"files": write()}
        except (OSError, SafetensorError) as error:
            result = {"error": f"rank {self._ranks.rank}: {error}"}
        results = self._ranks.gather_objects(result)
        errors = [entry["error"] for entry in results if "error" in entry]
        if errors:
            raise CheckpointError(
                f"{self._folder}: cannot write a checkpoint: {'; '.join(errors)}; free space and resume"
            )
        return {name: facts for entry in results for name, facts in entry["files"].items()}

    def _publish(self, aside: Path, target: Path, position: Position, files: dict[str, Any]) -> None:
        manifest = {
            "format": FORMAT,
            "step": position.step,
            "samples_seen": position.samples_seen,
            "fingerprint": position.fingerprint,
            "order": position.order,
            "world_size": self._ranks.world_size,
            "files": files,
        }
        write_json(aside / "manifest.json", manifest | {"seal": _seal_of(manifest)})
        if target.exists():  # damaged or of an earlier, overtaken attempt: set aside, never overwritten
            target.rename(_free_name(self._folder / f".old-{target.name}"))
        sync_folder(aside)
        aside.rename(target)
        sync_folder(self._folder)
        write_json(self._folder / "latest.json", {"checkpoint": target.name})
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        whole = [path for path in _candidates(self._folder) if path.name <= newest.name]
        stale = [path for path in self._folder.iterdir() if path.name.startswith((".old-", ".tmp-"))]
        for path in [*whole[self._keep :], *stale]:
            # Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint.
            doomed = path if path.name.startswith(".") else path.rename(_free_name(self._folder / f".old-{path.name}"))
            shutil.rmtree(doomed, ignore_errors=True)

    def load_newest(self, engine: Engine, fingerprint: str) -> Position | None:
        """Load the newest checkpoint that verifies into an engine; every rank must call it.

        Damaged ones are named and skipped.

        Returns:
            Where the training stands, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or they belong to another config.
        """
        choice = self._ranks.from_main(self._choose(fingerprint) if self._ranks.is_main else None)
        if "error" in choice:
            raise CheckpointError(choice["error"])
        if choice["path"] is None:
            return None
        path = Path(choice["path"])
        manifest = choice["manifest"]
        self._restore(path, manifest, engine)
        return Position(manifest["step"], manifest["samples_seen"], manifest["fingerprint"], manifest["order"])

    def _choose(self, fingerprint: str) -> dict[str, Any]:
        candidates = _candidates(self._folder)
        for path in candidates:
            damage = find_damage(path)
            if damage:
                self._say(f"{path}: damaged, skipped: {damage}")
                continue
            manifest = read_json(path / "manifest.json") or {}
            if manifest["fingerprint"] != fingerprint:
                return {"error": f"{path}: belongs to the trial {manifest['fingerprint']}, this one is {fingerprint}"}
            return {"path": str(path), "manifest": manifest}
        if candidates:
            reason = (
                f"{self._folder}: none of {len(candidates)} checkpoints is whole; delete the folder to start afresh"
            )
            return {"error": reason}
        return {"path": None}

    def _restore(self, path: Path, manifest: Mapping[str, Any], engine: Engine) -> None:
        engine.method.load_state_dict(load_file(path / "model.safetensors"), strict=True)
        engine.load_optimizer_state(_unflatten(load_file(path / "optimizer.safetensors")))
        if manifest["world_size"] == self._ranks.world_size:
            _set_random_state(load_file(path / f"rank-{self._ranks.rank}.safetensors"), self._ranks)
        elif self._ranks.is_main:
            ties = ", ".join(engine.method.rank_bound) or "nothing in this method"
            self._say(
                f"{path}: saved by {manifest['world_size']} ranks, resumed by {self._ranks.world_size}: "
                f"the global batches stay, sums round differently; tied to the rank count: {ties}"
            )


def model_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the parameters and buffers of a module to the CPU."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}


def save_weights(module: torch.nn.Module, path: Path) -> str:
    """Write a module's weights in one step and return their SHA-256; equal weights give equal bytes."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = _write_tensors(aside, model_state(module))
    aside.replace(path)
    return str(facts["sha256"])


def find_damage(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint; empty if it is whole."""
    manifest = read_json(checkpoint / "manifest.json")
    if manifest is None or not _is_sealed(manifest) or checkpoint.name != _name_of(manifest["step"]):
        return "manifest.json is missing, damaged or of another format"
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        if _sha256(path) != facts["sha256"]:
            return f"{name} fails its SHA-256"
    return ""


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _seal_of(manifest: Mapping[str, Any]) -> str:
    """Hash everything a manifest says, so that a flipped digit in it is damage as well."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sealed(manifest: Mapping[str, Any]) -> bool:
    return manifest.get("format") == FORMAT and manifest.get("seal") == _seal_of(manifest)


def _candidates(folder: Path) -> list[Path]:
    """List checkpoints, newest first; names sort by step."""
    return sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True)


def _free_name(path: Path) -> Path:
    """Return a name that nothing has, so that a rename overwrites nothing."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(10**6))
    return next(name for name in names if not name.exists())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file(dict(tensors), path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(state: OptimizerState) -> dict[str, Tensor]:
    # JSON keys, because parameter names hold dots and state names may too.
    return {json.dumps([name, key]): value for name, values in state.items() for key, value in values.items()}


def _unflatten(tensors: Mapping[str, Tensor]) -> OptimizerState:
    state: OptimizerState = {}
    for label, value in tensors.items():
        name, key = json.loads(label)
        state.setdefault(name, {})[key] = value
    return state


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(state: Mapping[str, Tensor], ranks: Ranks) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
