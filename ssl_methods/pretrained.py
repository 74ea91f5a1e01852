"""Weights that were trained elsewhere: read from a file or URL, and put into an encoder strictly or not at all."""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from ssl_methods.backbones.build import Headless

_MOCO = "encoder_q."  # what the authors' MoCo code trains; its twin is encoder_k
_LISTED = 6  # names of a list that an error shows


@dataclass(frozen=True)
class WeightsReport:
    """What was taken from a file.

    Attributes:
        source: path or URL.
        layout: whose names the file has.
        num_matched: tensors that were taken; none was missing and none unexpected.
        num_left: tensors that belong to something else: twins, queues, predictors, classifiers.
    """

    source: str
    layout: str
    num_matched: int
    num_left: int

    def text(self) -> str:
        """Tell it to a person."""
        counts = f"{self.num_matched} matched, 0 missing, 0 unexpected"
        return f"{self.source}: {self.layout}: {counts}, {self.num_left} of other parts left out"


def load_encoder(source: str, backbone: nn.Module, projector: nn.Module, *, sha256: str = "") -> WeightsReport:
    """Load a backbone and its projector, in place; both stay as they are if anything does not fit.

    Known layouts: a method of ours (`backbone.*`, `projector.*`), the authors' MoCo (`module.encoder_q.*`, whose `fc`
    is the projector), and a network as torchvision, timm or we name it, which has no projector. A projector without
    weights takes nothing, so that the file's own is left out. Of all other parts nothing is taken, queues above all.
    Counters of batches inside batch norms may be missing, as in files of before PyTorch 0.4.1.

    Args:
        source: path, or URL of any kind that fsspec opens; `.safetensors`, or what `torch.save` wrote.
        backbone: network to load, as `ssl_methods.backbones.build` makes them.
        projector: head to load.
        sha256: what the file's bytes must hash to; empty for no check.

    Raises:
        ValueError: the file is missing, damaged, or other bytes than `sha256`; or names or shapes do not fit, with
            lists of them; or a weight is not finite.
    """
    tensors = read_weights(source, sha256=sha256)
    wanted = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    wanted |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
    layout, found, unexpected = _find_homes(tensors, wanted, _removed_layers(backbone))
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    misshapen = [
        f"{name}: {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        lists = "; ".join(f"{len(names)} {kind}{_shown(names)}" for kind, names in counts)
        advice = "backbone, hidden_dim and embed_dim must be those that the file was trained with"
        raise ValueError(f"{source}: {layout}: {len(found)} matched; {lists}; {advice}")
    if broken := [name for name in wanted if name in found and not found[name].isfinite().all()]:
        raise ValueError(
            f"{source}: {len(broken)} tensors hold NaN or infinity{_shown(broken)}; a diverged training's?"
        )
    with torch.no_grad():
        for name, value in found.items():
            wanted[name].copy_(value)
    return WeightsReport(source, layout, len(found), len(tensors) - len(found))


def read_weights(source: str, *, sha256: str = "") -> dict[str, Tensor]:
    """Read all tensors of a file by name, without the `module.` that data parallelism puts in front.

    Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: the file is missing, holds no tensors by name, or does not hash to `sha256`.
    """
    data = _read(source)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256.lower():
        raise ValueError(f"{source}: SHA-256 is {found}, expected {sha256}")
    try:
        content = _parse(data)
    except Exception as error:  # damage shows anywhere inside torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source}: is no file of weights: {reason}") from error
    tensors = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{source}: holds no tensors, but {', '.join(sorted(content)[:_LISTED]) or 'nothing'}")
    return tensors


def _read(source: str) -> bytes:
    try:
        with fsspec.open(source, "rb") as file:
            data: bytes = file.read()
    except Exception as error:  # each store has errors of its own
        reason = str(error) if str(error) not in ("", source) else type(error).__name__
        raise ValueError(f"{source}: cannot be read: {reason}") from error
    return data


def _parse(data: bytes) -> dict[str, Any]:
    if data[8:9] == b"{":  # safetensors: eight bytes of length, then a header of JSON
        return dict(safetensors.torch.load(data))
    # trainers keep their command line beside the weights; a namespace holds attributes and runs nothing
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not tensors by name")
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {str(name): value for name, value in content.items()}


def _find_homes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], removed: Iterable[str]
) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return whose layout it is, the tensors by their names here, and the names that should have a place but do not."""
    if any(name.startswith("backbone.") for name in tensors):
        has_projector = any(name.startswith("projector.") for name in wanted)
        prefixes = ("backbone.", "projector.") if has_projector else ("backbone.",)
        layout, named = "a whole method", {name: name for name in tensors if name.startswith(prefixes)}
    elif any(name.startswith(_MOCO) for name in tensors):
        layout = "MoCo's query encoder"
        named = {name: f"backbone.{name.removeprefix(_MOCO)}" for name in tensors if name.startswith(_MOCO)}
    else:
        layout, named = "a network", {name: f"backbone.{name}" for name in tensors}
    found, unexpected = {}, []
    for name, place in named.items():
        home = _home(place, wanted, removed)
        if home:
            found[home] = tensors[name]
        elif home is None:
            unexpected.append(name)
    return layout, found, sorted(unexpected)  # a file has no order of its own


def _home(place: str, wanted: Mapping[str, Tensor], removed: Iterable[str]) -> str | None:
    """Return where a tensor goes; empty for a part of the classifier that is gone, None for nowhere.

    Networks of libraries lie in `network`. What lies where the classifier was is a projector, if it is one.
    """
    inside = place.replace("backbone.", "backbone.network.", 1)
    for candidate in (place, inside):
        if candidate in wanted:
            return candidate
    for layer in removed:
        for candidate in (place, inside):
            if candidate.startswith(f"backbone.{layer}."):
                part = f"projector.{candidate.removeprefix(f'backbone.{layer}.')}"
                return part if part in wanted else ""
    return None


def _removed_layers(backbone: nn.Module) -> list[str]:
    """Name the places where a library's network had its classifier."""
    return [f"network.{name}" for name in backbone.classifier] if isinstance(backbone, Headless) else []


def _shown(names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({', '.join(names[:_LISTED])}{more})"
