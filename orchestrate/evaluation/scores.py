"""Every probe on every encoder of a trial, as files."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from orchestrate.config.run import PROBES, RunConfig
from orchestrate.data.sample_source import Loading
from orchestrate.evaluation.features import extract
from orchestrate.evaluation.probe import Features, Probe
from orchestrate.runs import read_json, write_json
from ssl_methods import plugins

Encode = Callable[[Tensor], Tensor]  # uint8 images (batch, size, size, 3) -> features (batch, dim)


@dataclass(frozen=True)
class Place:
    """Where this process computes: its rank, how many there are, on what, and how it hears what rank 0 found or did.

    Attributes:
        as_main: returns on every rank what rank 0 passes, however long that takes to come.
    """

    rank: int
    world_size: int
    device: torch.device
    as_main: Callable[[bool], bool]


def build_probes(config: RunConfig) -> list[Probe]:
    """Build the probes of a config."""
    return [plugins.load(PROBES, probe.name)(**probe.params) for probe in config.probes]


def score_encoders(
    config: RunConfig, folder: Path, encoders: Mapping[str, Callable[[], Encode]], *, step: int, place: Place
) -> None:
    """Score encoders with the config's probes and write a file each; what an earlier attempt wrote is kept.

    Args:
        config: of the trial.
        folder: for the files.
        encoders: name -> builder, called only if a result of that encoder is missing; every rank must give the same.
        step: optimizer step the trained encoder stands at.
        place: this process.
    """
    probes = build_probes(config)
    for name, build in encoders.items():
        missing = [probe for probe in probes if not _is_written(folder, name, probe, step)]
        if not place.as_main(bool(missing)):  # the folder may look older from another node
            continue
        encode = build()
        began = time.perf_counter()
        # Training goes on without damaged samples, so its probes do too; a score is of the whole validation set.
        train = _extract(encode, config.data.train, config, place, damaged="leave out")
        val = _extract(encode, config.data.val, config, place, damaged="refuse")
        if train is not None and val is not None:
            seconds = time.perf_counter() - began
            for probe in missing:
                _score(folder, name, probe, train, val, step=step, feature_seconds=seconds)
        place.as_main(True)


def _extract(
    encode: Encode, url: str, config: RunConfig, place: Place, *, damaged: Literal["refuse", "leave out"]
) -> Features | None:
    return extract(
        encode,
        url,
        size=config.views.size,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        loading=Loading.of(config.system),
        damaged=damaged,
    )


def _result_file(folder: Path, encoder: str, probe: Probe) -> Path:
    return folder / f"{encoder}.{probe.key}.json"


def _is_written(folder: Path, encoder: str, probe: Probe, step: int) -> bool:
    result = read_json(_result_file(folder, encoder, probe))
    return result is not None and result["step"] == step


def reuse_scores(config: RunConfig, source: Path, folder: Path, *, step: int) -> None:
    """Take over scores of the trained encoder at a step from another folder; the same weights need no second look."""
    for probe in build_probes(config):
        result = read_json(_result_file(source, "trained", probe))
        if result is not None and result["step"] == step and not _is_written(folder, "trained", probe, step):
            write_json(_result_file(folder, "trained", probe), result)


def _score(
    folder: Path, encoder: str, probe: Probe, train: Features, val: Features, *, step: int, feature_seconds: float
) -> None:
    began = time.perf_counter()
    metrics = probe.score(train, val)
    result = {
        "encoder": encoder,
        "probe": type(probe).__name__.lower(),
        "key": probe.key,
        "metrics": metrics,
        "num_train": len(train.labels),
        "num_val": len(val.labels),
        "feature_dim": train.values.shape[1],
        "step": step,
        "feature_seconds": round(feature_seconds, 3),
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_json(_result_file(folder, encoder, probe), result)
    print(f"{encoder}: {probe.key}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)


def collect_metrics(config: RunConfig, folder: Path) -> dict[str, float]:
    """Read the scores in a folder as flat numbers: `knn_k20_cosine_t0.07.top1`, `random_init/knn....top1`."""
    metrics: dict[str, float] = {}
    for encoder, prefix in (("trained", ""), ("random_init", "random_init/"), ("raw_pixels", "raw_pixels/")):
        for probe in build_probes(config):
            result = read_json(_result_file(folder, encoder, probe))
            if result is not None:
                metrics |= {f"{prefix}{probe.key}.{name}": value for name, value in result["metrics"].items()}
    return metrics
