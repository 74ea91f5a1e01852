"""From trained weights to scores: those of a finished training, and those of its milestone checkpoints.

Where the training job scores too, this is its end. Where evaluation is a job of its own, the training leaves its
weights and results/trained.json; `evaluate` does the rest, also while the training goes on, as often as it is started.
"""

import hashlib
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from orchestrate.checkpoint_files import read_manifest, step_of
from orchestrate.config.run import RunConfig
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import MODEL, save_weights
from orchestrate.engine.methods import build_method
from orchestrate.engine.metrics import total_step_seconds
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.snapshot import Tensors
from orchestrate.engine.watch import Heartbeat
from orchestrate.errors import CheckpointError
from orchestrate.evaluation.features import encode_with, raw_pixels
from orchestrate.evaluation.scores import Encode, Place, collect_metrics, reuse_scores, score_encoders
from orchestrate.runs import RunDir, write_json
from orchestrate.score_files import DONE, FINAL, num_scores, read_proof, scores_folder, skip, unscored
from ssl_methods.method import Method
from ssl_methods.views import normalise
from ssl_methods.views import recipe as view_recipe

_PACKAGES = ("orchestrate-ssl", "torch", "torchvision", "timm", "deepspeed", "numpy")


def plain_copy(config: RunConfig, engine: Engine, ranks: Ranks) -> Method:
    """Build the method anew with what was trained: whole, without the engine's hooks, equal on all ranks."""
    plain = build_method(config).to(ranks.device)
    with engine.whole():
        plain.load_state_dict(engine.method.state_dict())
    # Batch norms that saw one rank's part have moments of their own on each rank; rank 0's are the encoder's.
    ranks.fill_from_main(plain.buffers())
    return plain


def keep_weights(
    config: RunConfig, run: RunDir, ranks: Ranks, method: Method, *, step: int, num_samples: int
) -> dict[str, Any]:
    """Write the final weights, on rank 0, and return what done.json says of the training: everything but the scores."""
    sha256 = save_weights(method, run.weights_file)
    train_seconds = total_step_seconds(run.metrics_file)
    return {
        **_length(config, step, num_samples),
        "num_train_samples": num_samples,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "train_seconds": round(train_seconds, 3),
        "rank_seconds": round(train_seconds * ranks.world_size, 3),
        "weights": str(run.weights_file.relative_to(run.path)),
        "weights_sha256": sha256,
        "versions": _versions(),
    }


def _length(config: RunConfig, step: int, num_samples: int) -> dict[str, Any]:
    images = step * config.train.global_batch
    return {"fingerprint": config.fingerprint(), "step": step, "images": images, "epochs": images / num_samples}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def write_trained(run: RunDir, training: dict[str, Any]) -> None:
    """Prove that the training is over."""
    write_json(run.trained_file, {**training, "trained": time.time()})


def write_done(config: RunConfig, run: RunDir, training: dict[str, Any]) -> None:
    """Prove that the trial is complete: what `keep_weights` returned, with the scores."""
    facts = {key: value for key, value in training.items() if key != "trained"}
    write_json(run.done_file, {**facts, "metrics": collect_metrics(config, run.results), "finished": time.time()})


def score_final(config: RunConfig, run: RunDir, ranks: Ranks, method: Method, *, step: int) -> None:
    """Score the trained encoder, and beside it the encoders that learned nothing; every rank must call it."""
    encoders = {
        "trained": lambda: _encode(config, method, ranks),
        "random_init": lambda: _encode(config, build_method(config), ranks),
        "raw_pixels": lambda: raw_pixels,
    }
    score_encoders(config, run.results, encoders, step=step, place=_place(ranks))


def _encode(config: RunConfig, method: Method, ranks: Ranks) -> Encode:
    prepare = partial(normalise, recipe=view_recipe(config.views.name, config.views.size))
    return encode_with(method.encoder(), prepare, ranks.device)


def _place(ranks: Ranks) -> Place:
    return Place(ranks.rank, ranks.world_size, ranks.device, lambda answer: ranks.on_main(lambda: answer))


def evaluate(
    config: RunConfig,
    run: RunDir,
    ranks: Ranks,
    *,
    num_samples: int,
    heartbeat: Heartbeat,
    say: Callable[[str], None] = print,
) -> None:
    """Score what waits to be scored now: milestone checkpoints, and the final weights if the training is over.

    Every rank must call it; only rank 0 looks at the RunDir. A score that exists is kept, so that a job which was ended
    in the middle loses one probe. A checkpoint that is gone meanwhile, or damaged, is told and left out.

    Raises:
        CheckpointError: the final weights are damaged.
    """
    fingerprint = config.fingerprint()
    names = ranks.on_main(lambda: unscored(run, fingerprint))
    done = num_scores(run) if ranks.is_main else 0
    heartbeat.update(state="evaluating", first_step=done, step=done)
    if not names:
        say("nothing waits to be scored")
    for name in names:
        say(f"{name}:")
        if name == FINAL:
            _evaluate_final(config, run, ranks)
        else:
            _evaluate_checkpoint(config, run, ranks, name, num_samples=num_samples, say=say)
        if ranks.is_main:
            heartbeat.update(step=num_scores(run))
    ranks.wait_for_main()  # nobody leaves before the last proof is written


def _evaluate_final(config: RunConfig, run: RunDir, ranks: Ranks) -> None:
    training = ranks.on_main(lambda: read_proof(run.trained_file, config.fingerprint()))
    if training is None:  # taken back meanwhile
        return
    step = int(training["step"])
    method = _load(config, ranks, lambda: _final_weights(run, str(training["weights_sha256"])))
    assert method is not None
    if ranks.is_main:
        for checkpoint in run.results.glob("step-*"):
            reuse_scores(config, checkpoint, run.results, step=step)
    ranks.wait_for_main()
    score_final(config, run, ranks, method, step=step)
    if ranks.is_main:
        write_done(config, run, training)


def _evaluate_checkpoint(
    config: RunConfig, run: RunDir, ranks: Ranks, name: str, *, num_samples: int, say: Callable[[str], None]
) -> None:
    folder, step = scores_folder(run, name), step_of(name)
    method = _load(config, ranks, lambda: _checkpoint_weights(run, name, say))
    if method is None:
        return
    if ranks.is_main:
        reuse_scores(config, run.results, folder, step=step)
    ranks.wait_for_main()
    encoders = {"trained": lambda: _encode(config, method, ranks)}
    score_encoders(config, folder, encoders, step=step, place=_place(ranks))
    if ranks.is_main:
        metrics = collect_metrics(config, folder)
        write_json(folder / DONE, {**_length(config, step, num_samples), "metrics": metrics, "finished": time.time()})


def _load(config: RunConfig, ranks: Ranks, read: Callable[[], Tensors | None]) -> Method | None:
    """Build the method with the weights that rank 0 reads, whatever ranks and engine made them; None if it has none."""
    method = build_method(config).to(ranks.device)

    def load() -> bool:
        weights = read()
        try:
            method.load_state_dict(weights or {}, strict=weights is not None)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit {config.method.name}: {error}") from error
        return weights is not None

    if not ranks.on_main(load):
        return None
    ranks.fill_from_main(method.state_dict().values())
    return method


def _final_weights(run: RunDir, sha256: str) -> Tensors:
    try:
        return _read_weights(run.weights_file, sha256)
    except CheckpointError as error:
        advice = f"remove {run.trained_file} and resume, which writes it again from the last checkpoint"
        raise CheckpointError(f"{error}; {advice}") from error


def _checkpoint_weights(run: RunDir, name: str, say: Callable[[str], None]) -> Tensors | None:
    path = run.checkpoints / name
    manifest = read_manifest(path)
    try:
        return _read_weights(path / MODEL, manifest["files"][MODEL]["sha256"]) if manifest else None
    except CheckpointError as error:
        if path.exists():
            say(f"{error}; skipped")
            skip(run, name, str(error))
    return None


def _read_weights(path: Path, sha256: str) -> Tensors:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise CheckpointError(f"{path}: fails its SHA-256, so it is damaged")
        weights: Tensors = load_file(path)
        return weights
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
