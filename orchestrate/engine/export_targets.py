"""How a library loads an encoder: as Python that is run here, and told to the user, word for word the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from orchestrate.errors import ConfigError
from ssl_methods.backbone import Backbone
from ssl_methods.backbones import build
from ssl_methods.packed import pack, unpack

Format = Literal["torchvision", "timm", "safetensors", "packed"]
FORMATS: tuple[Format, ...] = get_args(Format)
NUM_IMAGES = 4
_SHOWN_NAMES = 3
# Their auxiliary classifiers, which our backbones lack, and a start that is overwritten anyway.
_TORCHVISION_OPTIONS = dict.fromkeys(("googlenet", "inception_v3"), ", aux_logits=False, init_weights=False")


@dataclass(frozen=True)
class LoadReport:
    """How the names and shapes of an encoder's tensors meet those of another network.

    Attributes:
        matched: number of tensors that have the name and the shape of one there.
        missing: names there that the encoder lacks; those of a classifier are expected.
        unexpected: names that are not known there, or have another shape.
    """

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def classifier(self) -> str:
        """The only layer there that the encoder has no weights for; empty if it has all, or lacks several."""
        layers = {name.rpartition(".")[0] for name in self.missing}
        return layers.pop() if len(layers) == 1 else ""

    @property
    def fits(self) -> bool:
        """Whether nothing but a classifier lies between the two."""
        return not self.unexpected and (not self.missing or bool(self.classifier))


@dataclass(frozen=True)
class Loading:
    """What a library does with an encoder's tensors.

    Attributes:
        tensors: the encoder's, with the library's names.
        statements: Python that makes the network, without its classifier, in `model`.
        report: the tensors against the network with its classifier.
        packed: whether binary weights lie packed in the file.
    """

    tensors: Mapping[str, Tensor]
    statements: tuple[str, ...]
    report: LoadReport
    packed: bool = False

    def recipe(self, file: str) -> str:
        """Return a line of Python that leaves the network in `model`, with the weights of a file, ready to be used."""
        read = f"unpack(load_file({file!r}))" if self.packed else f"load_file({file!r})"
        load = f"model.load_state_dict({read}, strict=True)"
        return "; ".join(("from safetensors.torch import load_file", *self.statements, load, "model.eval()"))


def plan_loading(encoder: Backbone, form: Format, *, name: str, stem: build.Stem, window: int = 0) -> Loading:
    """Find out how a library loads an encoder.

    Args:
        encoder: with its weights.
        form: the library; `safetensors` stands for ours, which has a home for every backbone, and `packed` for ours
            with a bit for each weight of a binary convolution (see `ssl_methods.packed`).
        name, stem, window: of the encoder, in the config.

    Raises:
        ConfigError: it cannot; the message says which format can.
    """
    loading = _plan(encoder, form, name, stem, window)
    if isinstance(loading, Loading):
        return loading
    fitting = [other for other in FORMATS if isinstance(_plan(encoder, other, name, stem, window), Loading)]
    advice = f"use --format {' or '.join(fitting)}" if fitting else "no format fits, as the method changed the network"
    raise ConfigError(f"--format {form}: {loading}; {advice}")


def run_recipe(recipe: str) -> nn.Module:
    """Run a recipe as a user would, without touching this process's random numbers, and return its network."""
    variables: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(recipe, variables)
    model: nn.Module = variables["model"]
    return model


def feature_difference(encoder: Backbone, model: nn.Module, *, size: int) -> tuple[float, float]:
    """Return how far features of two networks are apart on random images of `size` pixels.

    Returns:
        The largest absolute difference, and its ratio to the encoder's largest feature.
    """
    images = torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        here, there = encoder.eval()(images), model.eval()(images)
    if here.shape != there.shape:
        raise ConfigError(f"features there have the shape {tuple(there.shape)}, here {tuple(here.shape)}")
    absolute = float((here - there).abs().max())
    return absolute, absolute / max(float(here.abs().max()), torch.finfo(here.dtype).tiny)


def _plan(encoder: Backbone, form: Format, name: str, stem: build.Stem, window: int) -> Loading | str:
    """Plan how a library loads an encoder, or say why it cannot."""
    if form == "packed":
        return _plan_packed(encoder, name, stem)
    network = encoder if form == "safetensors" or not isinstance(encoder, build.Headless) else encoder.network
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    statements = _making(form, name, stem, window)
    if not statements:
        return f"{name} is no network of {form}"
    if stem == "small" and form != "safetensors":
        width = len(tensors["conv1.weight"])
        small = f"model.conv1 = torch.nn.Conv2d(3, {width}, 3, padding=1, bias=False)"
        statements = ("import torch", *statements, small, "model.maxpool = torch.nn.Identity()")
    report = _compare(tensors, run_recipe("; ".join(statements)))
    if not report.fits:
        return f"the weights of {name} do not fit its namesake there: {_misfit(report)}"
    if report.classifier:
        statements = ("import torch", *statements, f"model{_access(report.classifier)} = torch.nn.Identity()")
    return Loading(tensors, tuple(dict.fromkeys(statements)), report)


def _plan_packed(encoder: Backbone, name: str, stem: build.Stem) -> Loading | str:
    try:
        tensors = pack(encoder)
    except ValueError as error:
        return str(error)
    statements = ("from ssl_methods.packed import unpack", *_making("safetensors", name, stem))
    report = _compare(unpack(tensors), run_recipe("; ".join(statements)))
    if not report.fits:
        return f"the weights of {name} do not fit its namesake there: {_misfit(report)}"
    return Loading(tensors, statements, report, packed=True)


def _making(form: Format, name: str, stem: build.Stem, window: int = 0) -> tuple[str, ...]:
    """Return the statements that make a library's own network in `model`; none if it has none of that name."""
    if form == "safetensors":
        options = ("" if stem == "default" else f", stem={stem!r}") + (f", window={window}" if window else "")
        return ("from ssl_methods.backbones.build import build", f"model = build({name!r}{options})")
    if name in build.names():
        return ()
    if form == "torchvision":
        from torchvision import models

        options = _TORCHVISION_OPTIONS.get(name, "")
        known = name in models.list_models(module=models)
        return ("import torchvision", f"model = torchvision.models.get_model({name!r}{options})") if known else ()
    import timm

    known = timm.is_model(name)
    options = f", window_size={window}" if window else ""
    return ("import timm", f"model = timm.create_model({name!r}, num_classes=0{options})") if known else ()


def _compare(tensors: Mapping[str, Tensor], model: nn.Module) -> LoadReport:
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    matched = {name for name, value in tensors.items() if shapes.get(name) == value.shape}
    missing = tuple(name for name in shapes if name not in tensors)
    return LoadReport(len(matched), missing, tuple(name for name in tensors if name not in matched))


def _misfit(report: LoadReport) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN_NAMES])}{', ...' if len(names) > _SHOWN_NAMES else ''})"
        for names, what in ((report.unexpected, "not known there"), (report.missing, "missing here"))
        if names
    ]
    return ", ".join(parts)


def _access(path: str) -> str:
    """Write how a part of a network is reached: `classifier.2` is `.classifier[2]`."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))
