"""The encoder of a trial as a file that another library loads: written, loaded there, compared image by image.

The file holds the library's own names in safetensors. Beside it, `<file>.json` says where the weights come from and
how to load them: a line of Python that was run on the file before it got its name.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from orchestrate.checkpoint_files import find_damage, list_checkpoints, name_of, step_of
from orchestrate.config.run import RunConfig, load_run
from orchestrate.engine.export_targets import (
    NUM_IMAGES,
    Format,
    Loading,
    LoadReport,
    feature_difference,
    plan_loading,
    run_recipe,
)
from orchestrate.engine.methods import build_method
from orchestrate.engine.tensor_file import write_tensors
from orchestrate.errors import CheckpointError, ConfigError, RunDirError
from orchestrate.runs import RunDir, read_json, sync_folder, write_json
from ssl_methods.backbone import Backbone
from ssl_methods.packed import settle_zeros
from ssl_methods.views import recipe as view_recipe

NEWEST = "newest"
# The operations are the same on both sides; a library may add the terms of a sum in another order.
LARGEST_DIFFERENCE = 1e-5
# What networks raise for weights that they do not take.
_REFUSALS = (RuntimeError, ValueError)


@dataclass(frozen=True)
class Weights:
    """A file with the weights of a trial's whole method, their step, and newer checkpoints that are damaged."""

    path: Path
    step: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """What was exported, as `<file>.json` holds it.

    Attributes:
        trial, fingerprint: the RunDir's name, and the fingerprint of its config.
        step, weights: which weights, and the file of the RunDir that they were read from.
        skipped: newer checkpoints than these that are damaged, and how.
        images: side in pixels, and mean and deviation that images are normalised with.
        max_abs_difference, max_relative_difference: of features there and here on random images.
        recipe: a line of Python that leaves the loaded network in `model`, run beside the file.
        zeros: weights of binary convolutions that were exactly 0, and have a sign in a packed file.
    """

    trial: str
    fingerprint: str
    step: int
    weights: str
    skipped: tuple[str, ...]
    method: str
    backbone: str
    stem: str
    window: int
    format: Format
    file: str
    sha256: str
    embed_dim: int
    images: dict[str, Any]
    report: LoadReport
    max_abs_difference: float
    max_relative_difference: float
    recipe: str
    versions: dict[str, str]
    zeros: int = 0

    def text(self) -> str:
        """Tell it to a person."""
        report, images = self.report, self.images
        zeros = f"\n  {self.zeros} binary weights that were 0 became positive, there and here" if self.zeros else ""
        classifier = f" (the classifier: {', '.join(report.missing)})" if report.missing else ""
        return (
            f"{self.file}: {self.backbone} of trial {self.trial} ({self.method}) after step {self.step}\n"
            f"  names: {report.matched} matched, {len(report.missing)} missing{classifier}, 0 unexpected\n"
            f"  features of {NUM_IMAGES} random images there and here: max abs difference"
            f" {self.max_abs_difference:.2g}, relative {self.max_relative_difference:.2g}\n"
            f"  images: {images['size']} px, mean {images['mean']}, std {images['std']}\n"
            f"  load: {self.recipe}{zeros}" + "".join(f"\n  skipped, as it is damaged: {each}" for each in self.skipped)
        )


def export_encoder(run: RunDir, out: Path, *, form: Format, checkpoint: str = "") -> Export:
    """Write the encoder of a trial with the names of a library, load it there, and compare the features.

    Args:
        run: of the trial.
        out: file to write; `<out>.json` goes beside it. A file that has the same bytes stays.
        form: the library.
        checkpoint: a step, or "newest" for the newest whole checkpoint; empty for the weights of a finished trial.

    Raises:
        ConfigError: the backbone does not fit the library, or has other features there.
        RunDirError: the trial is not done, or `out` or `<out>.json` exists and holds something else.
        CheckpointError: the weights are damaged, or there is no such checkpoint.
    """
    record_file = out.with_name(f"{out.name}.json")
    _refuse_foreign(record_file)
    config = load_run(run.config_file)
    weights = find_weights(run, checkpoint)
    encoder = load_encoder(config, weights)
    zeros = settle_zeros(encoder) if form == "packed" else 0
    loading = plan_loading(encoder, form, **config.backbone.model_dump())
    sha256, differences = _write(encoder, loading, out, size=config.views.size)
    export = Export(
        trial=run.path.name,
        step=weights.step,
        weights=str(weights.path.relative_to(run.path)),
        skipped=weights.skipped,
        format=form,
        file=out.name,
        sha256=sha256,
        embed_dim=encoder.embed_dim,
        report=loading.report,
        max_abs_difference=differences[0],
        max_relative_difference=differences[1],
        recipe=loading.recipe(out.name),
        versions=_versions(),
        zeros=zeros,
        **_facts_of(config),
    )
    write_json(record_file, asdict(export))
    return export


def find_weights(run: RunDir, checkpoint: str) -> Weights:
    """Find the weights that a user means by a checkpoint's step, by "newest", or by nothing: those of a finished trial.

    Raises:
        ConfigError: `checkpoint` is neither.
        RunDirError: the trial is not done.
        CheckpointError: the weights are damaged, or there is no such checkpoint.
    """
    if not checkpoint:
        return _final_weights(run)
    if checkpoint != NEWEST and not checkpoint.isdecimal():
        raise ConfigError(f"--checkpoint {checkpoint}: write a step, or {NEWEST}")
    wanted = list_checkpoints(run.checkpoints)
    if checkpoint != NEWEST:
        wanted = [path for path in wanted if path.name == name_of(int(checkpoint))]
    damages: list[str] = []
    for path in wanted:
        damage = find_damage(path)
        if not damage:
            return Weights(path / "model.safetensors", step_of(path.name), tuple(damages))
        damages.append(f"{path.name}: {damage}")
    found = "\n  ".join([f"{run.checkpoints}: --checkpoint {checkpoint}: no whole one; {_offer(run)}", *damages])
    raise CheckpointError(found)


def _final_weights(run: RunDir) -> Weights:
    done = read_json(run.done_file)
    if done is None or done.get("fingerprint") != run.path.name:
        raise RunDirError(f"{run.path}: the trial is not done, so it has no final weights; {_offer(run)}")
    if not run.weights_file.is_file():
        raise CheckpointError(f"{run.weights_file}: is missing; {_offer(run)}")
    with run.weights_file.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != done.get("weights_sha256"):
            raise CheckpointError(f"{run.weights_file}: fails its SHA-256, so it is damaged; {_offer(run)}")
    return Weights(run.weights_file, int(done["step"]))


def _offer(run: RunDir) -> str:
    """Say which checkpoints there are; whether they are whole shows when they are asked for."""
    steps = [str(step_of(path.name)) for path in list_checkpoints(run.checkpoints)]
    if not steps:
        return "there is no checkpoint in the RunDir"
    return f"there are checkpoints of step {', '.join(steps)}: export one with --checkpoint STEP, or {NEWEST}"


def load_encoder(config: RunConfig, weights: Weights) -> Backbone:
    """Build a trial's method with its weights, and return the part that is evaluated.

    Raises:
        CheckpointError: the weights are not those of such a method.
    """
    with torch.random.fork_rng(devices=[]):
        method = build_method(config)
    try:
        method.load_state_dict(load_file(weights.path), strict=True)
    except (*_REFUSALS, SafetensorError, OSError) as error:  # a job may have removed the checkpoint meanwhile
        raise CheckpointError(f"{weights.path}: cannot be loaded into {config.method.name}: {error}") from error
    return method.encoder()


def _write(encoder: Backbone, loading: Loading, out: Path, *, size: int) -> tuple[str, tuple[float, float]]:
    """Write the file if it loads as it should; return its SHA-256, and how far features there are from ours."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        sha256 = str(write_tensors(aside, loading.tensors)["sha256"])
        differences = verify_loading(encoder, loading, aside, size=size)
        _put_in_place(aside, out, sha256)
    finally:
        aside.unlink(missing_ok=True)
    return sha256, differences


def verify_loading(encoder: Backbone, loading: Loading, file: Path, *, size: int) -> tuple[float, float]:
    """Load a file as its recipe says, compare its features with the encoder's, and return the largest differences.

    Raises:
        ConfigError: the library computes something else from the same weights.
    """
    try:
        there = run_recipe(loading.recipe(str(file)))
    except _REFUSALS as error:
        raise ConfigError(f"the weights fit, but cannot be loaded there: {error}; use --format safetensors") from error
    absolute, relative = feature_difference(encoder, there, size=size)
    if not relative <= LARGEST_DIFFERENCE:  # a NaN is no agreement either
        found = f"max abs difference {absolute:.3g}, relative {relative:.3g}, of at most {LARGEST_DIFFERENCE:g}"
        raise ConfigError(f"the weights fit, but features there differ: {found}; use --format safetensors")
    return absolute, relative


def _refuse_foreign(record_file: Path) -> None:
    record = read_json(record_file)
    if record_file.exists() and (record is None or not {"trial", "recipe", "sha256"} <= record.keys()):
        raise RunDirError(f"{record_file}: exists and is no record of an export; choose another --out, or remove it")


def _put_in_place(aside: Path, out: Path, sha256: str) -> None:
    if not out.exists():
        aside.replace(out)
        sync_folder(out.parent)
        return
    if not out.is_file():
        raise RunDirError(f"{out}: is a folder; write a file name with --out")
    with out.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise RunDirError(f"{out}: exists and has other bytes; choose another --out, or remove it")


def _facts_of(config: RunConfig) -> dict[str, Any]:
    views = view_recipe(config.views.name, config.views.size)
    return {
        "fingerprint": config.fingerprint(),
        "method": config.method.name,
        "backbone": config.backbone.name,
        "stem": config.backbone.stem,
        "window": config.backbone.window,
        "images": {"size": views.size, "mean": views.mean, "std": views.std},
    }


def _versions() -> dict[str, str]:
    packages = ("orchestrate-ssl", "torch", "torchvision", "timm", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
