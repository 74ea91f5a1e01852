"""Backbones by name: our own files first, then torchvision, then timm."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods import plugins
from ssl_methods.backbone import Backbone

Stem = Literal["default", "small"]
PACKAGE = "ssl_methods.backbones"
_OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        "resnet": {"zero_init_residual": True},
        # their auxiliary classifiers would change what forward returns
        "googlenet": {"aux_logits": False, "init_weights": True},
        "inception": {"aux_logits": False, "init_weights": True},
    }
)
# plain vision transformers then take any multiple of their patch, as multi-crop recipes ask; other sizes resample the
# positions, the built-in size is as ever
_TIMM_OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {"vision_transformer": {"dynamic_img_size": True}, "deit": {"dynamic_img_size": True}}
)


def names() -> tuple[str, ...]:
    """List our own backbones; torchvision's and timm's classification networks go by their names there."""
    return tuple(name for name in plugins.names(PACKAGE) if name != "build")


def exists(name: str) -> bool:
    """Tell whether `build` knows a name; imports timm only if nothing else has it."""
    return name in names() or name in _torchvision_names() or name in _timm_names()


def suggest(name: str) -> list[str]:
    """Return known names that look like `name`, closest first, at most three."""
    return get_close_matches(name, [*names(), *_torchvision_names(), *_timm_names()], n=3)


def build(name: str, *, stem: Stem = "default") -> Backbone:
    """Build an untrained backbone without its classifier.

    Args:
        name: own, torchvision or timm name, looked up in this order. ResNets start with each block's last batch
            norm at zero, as in Barlow Twins (timm does so by itself).
        stem: "small" gives torchvision ResNets a 3x3 stride-1 first convolution and no max pooling, for images of
            about 32 px (Chen et al. 2020, arXiv:2002.05709, appendix B.9).

    Raises:
        ValueError: unknown name, or a small stem for a network that is no torchvision ResNet.
    """
    if not exists(name):
        close = ", ".join(suggest(name)) or f"{', '.join(names())}, resnet18, resnet50"
        raise ValueError(f"backbone {name!r}: not one of ours, nor of torchvision or timm; did you mean {close}?")
    if stem == "small" and _torchvision_family(name) != "resnet":
        raise ValueError(f"backbone {name!r}: stem 'small' is for torchvision ResNets; leave stem out")
    if name in names():
        own: Backbone = plugins.load(PACKAGE, name)()
        return own
    return _build_torchvision(name, stem=stem) if name in _torchvision_names() else _build_timm(name)


class Headless(Backbone):
    """A classification network whose classifier is gone; `network` keeps its own parameter names."""

    def __init__(self, network: nn.Module, *, embed_dim: int) -> None:
        super().__init__()
        self.network = network
        self.embed_dim = embed_dim

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return what the classifier would have seen."""
        features: Tensor = self.network(images)
        return features


def _build_torchvision(name: str, *, stem: Stem) -> Backbone:
    from torchvision.models import get_model

    network = get_model(name, weights=None, **_OPTIONS.get(_torchvision_family(name), {}))
    if stem == "small":
        _shrink_stem(network)
    return Headless(network, embed_dim=_remove_classifier(network))


def _torchvision_family(name: str) -> str:
    """Return the file of torchvision that a name comes from; empty for names that are not torchvision's."""
    from torchvision.models import get_model_builder

    return get_model_builder(name).__module__.rpartition(".")[-1] if name in _torchvision_names() else ""


def _shrink_stem(network: Any) -> None:
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _remove_classifier(network: nn.Module) -> int:
    """Put the identity for the last layer that has weights, silence the dropout before it, return its input width."""
    path, layer = [each for each in network.named_modules() if isinstance(each[1], nn.Linear | nn.Conv2d)][-1]
    head, _, _ = path.partition(".")
    for name, child in network.named_children():
        if name in (head, "dropout"):
            _silence_dropout(child)
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _silence_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def _build_timm(name: str) -> Backbone:
    import timm
    from timm.models import model_entrypoint

    family = model_entrypoint(name).__module__.rpartition(".")[-1]
    network = timm.create_model(name, pretrained=False, num_classes=0, **_TIMM_OPTIONS.get(family, {}))
    # Some networks widen their features once more inside the head, which stays without its classifier.
    return Headless(network, embed_dim=int(getattr(network, "head_hidden_size", None) or network.num_features))


@cache
def _torchvision_names() -> frozenset[str]:
    from torchvision import models

    return frozenset(models.list_models(module=models))


@cache
def _timm_names() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())
