"""Backbones by name: our own files first, then torchvision, then timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods import plugins
from ssl_methods.backbone import Backbone, Encoded, TokenBackbone

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
# these then take the sizes of multi-crop recipes, vision transformers any multiple of their patch; other sizes resample
# positions and pad windows, the built-in size is as ever
_TIMM_OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {family: {"dynamic_img_size": True} for family in ("vision_transformer", "deit", "swin_transformer")}
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


def build(name: str, *, stem: Stem = "default", window: int = 0) -> Backbone:
    """Build an untrained backbone without its classifier.

    Args:
        name: own, torchvision or timm name, looked up in this order. ResNets start with each block's last batch
            norm at zero, as in Barlow Twins (timm does so by itself).
        stem: "small" gives torchvision ResNets a 3x3 stride-1 first convolution and no max pooling, for images of
            about 32 px (Chen et al. 2020, arXiv:2002.05709, appendix B.9).
        window: side of the windows of attention, tokens; 0 as the name says. For timm's Swin transformers and our own
            networks with windows.

    Raises:
        ValueError: unknown name, a small stem for a network that is no torchvision ResNet, or a window for one that
            has none to choose.
    """
    if not exists(name):
        close = ", ".join(suggest(name)) or f"{', '.join(names())}, resnet18, resnet50"
        raise ValueError(f"backbone {name!r}: not one of ours, nor of torchvision or timm; did you mean {close}?")
    if stem == "small" and _torchvision_family(name) != "resnet":
        raise ValueError(f"backbone {name!r}: stem 'small' is for torchvision ResNets; leave stem out")
    if window and not _takes_window(name):
        ours = ", ".join(each for each in names() if _takes_window(each))
        fix = f"leave it out, or take {ours} or one of timm's Swin transformers, as swin_tiny_patch4_window7_224"
        raise ValueError(f"backbone {name!r}: window {window}: it leaves no choice of windows; {fix}")
    if name in names():
        own: Backbone = plugins.load(PACKAGE, name)(**({"window": window} if window else {}))
        return own
    if name in _torchvision_names():
        return _build_torchvision(name, stem=stem)
    return _build_timm(name, **({"window_size": window} if window else {}))


class Headless(Backbone):
    """A classification network whose classifier is gone; `network` keeps its own parameter names.

    Args:
        network: without its classifier.
        embed_dim: width of the features.
        classifier: names of the layers in `network` that have gone, of which files of weights still tell.
    """

    def __init__(self, network: nn.Module, *, embed_dim: int, classifier: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self.embed_dim = embed_dim
        self.classifier = tuple(classifier)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return what the classifier would have seen."""
        features: Tensor = self.network(images)
        return features


class HeadlessTokens(TokenBackbone, Headless):
    """A headless network that also gives the features of regions, from the map that it averages or its tokens.

    Args:
        network: without its classifier.
        embed_dim: width of the features.
        classifier: as of `Headless`.
        encode: computes both with the network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        embed_dim: int,
        classifier: Sequence[str] = (),
        encode: Callable[[Any, Tensor], Encoded],
    ) -> None:
        super().__init__(network, embed_dim=embed_dim, classifier=classifier)
        self._encode = encode

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return what the classifier would have seen, and the same before it was averaged."""
        return self._encode(self.network, images)


def _build_torchvision(name: str, *, stem: Stem) -> Backbone:
    from torchvision.models import get_model

    network = get_model(name, weights=None, **_OPTIONS.get(_torchvision_family(name), {}))
    if stem == "small":
        _shrink_stem(network)
    classifier, embed_dim = _remove_classifier(network)
    return _headless(network, embed_dim, (classifier,), _TORCHVISION_TOKENS.get(_torchvision_family(name)))


def _headless(
    network: nn.Module,
    embed_dim: int,
    classifier: Sequence[str],
    encode: Callable[[Any, Tensor], Encoded] | None,
) -> Backbone:
    if encode is None:
        return Headless(network, embed_dim=embed_dim, classifier=classifier)
    return HeadlessTokens(network, embed_dim=embed_dim, classifier=classifier, encode=encode)


def _takes_window(name: str) -> bool:
    if name in names():
        return "window" in inspect.signature(plugins.load(PACKAGE, name)).parameters
    return name not in _torchvision_names() and _timm_family(name) == "swin_transformer"


def _torchvision_family(name: str) -> str:
    """Return the file of torchvision that a name comes from; empty for names that are not torchvision's."""
    from torchvision.models import get_model_builder

    return get_model_builder(name).__module__.rpartition(".")[-1] if name in _torchvision_names() else ""


def _shrink_stem(network: Any) -> None:
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _remove_classifier(network: nn.Module) -> tuple[str, int]:
    """Put the identity for the last layer that has weights and silence the dropout before it.

    Return that layer's name and the width of its input.
    """
    path, layer = [each for each in network.named_modules() if isinstance(each[1], nn.Linear | nn.Conv2d)][-1]
    head, _, _ = path.partition(".")
    for name, child in network.named_children():
        if name in (head, "dropout"):
            _silence_dropout(child)
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return path, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _silence_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def _build_timm(name: str, **options: Any) -> Backbone:
    import timm

    family = _timm_family(name)
    network = timm.create_model(name, pretrained=False, num_classes=0, **_TIMM_OPTIONS.get(family, {}), **options)
    # Some networks widen their features once more inside the head, which stays without its classifier.
    embed_dim = int(getattr(network, "head_hidden_size", None) or network.num_features)
    return _headless(network, embed_dim, _timm_classifier(network), _TIMM_TOKENS.get(family))


def _timm_classifier(network: Any) -> tuple[str, ...]:
    """Name the layers that timm has put the identity for; distilled networks have two classifiers."""
    try:
        gone = network.get_classifier()
    except AttributeError:  # of those that look inside it though it is gone
        return ("head",)
    layers = gone if isinstance(gone, tuple | list) else (gone,)
    return tuple(name for name, module in network.named_modules() if any(module is layer for layer in layers))


def _timm_family(name: str) -> str:
    """Return the file of timm that a name comes from."""
    from timm.models import model_entrypoint

    return str(model_entrypoint(name).__module__).rpartition(".")[-1]


def _encode_torchvision_resnet(network: Any, images: Tensor) -> Encoded:
    grid = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    grid = network.layer4(network.layer3(network.layer2(network.layer1(grid))))
    return Encoded(network.avgpool(grid).flatten(1), grid.flatten(2).transpose(1, 2))


def _encode_torchvision_swin(network: Any, images: Tensor) -> Encoded:
    grid = network.norm(network.features(images))
    return Encoded(network.flatten(network.avgpool(network.permute(grid))), grid.flatten(1, 2))


def _encode_timm_resnet(network: Any, images: Tensor) -> Encoded:
    grid = network.forward_features(images)
    return Encoded(network.forward_head(grid), grid.flatten(2).transpose(1, 2))


def _encode_timm_swin(network: Any, images: Tensor) -> Encoded:
    grid = network.forward_features(images)
    return Encoded(network.forward_head(grid), grid.flatten(1, 2))


def _encode_timm_vit(network: Any, images: Tensor) -> Encoded:
    tokens = network.forward_features(images)
    return Encoded(network.forward_head(tokens), tokens[:, network.num_prefix_tokens :])


_TORCHVISION_TOKENS: Mapping[str, Callable[[Any, Tensor], Encoded]] = MappingProxyType(
    {"resnet": _encode_torchvision_resnet, "swin_transformer": _encode_torchvision_swin}
)
_TIMM_TOKENS: Mapping[str, Callable[[Any, Tensor], Encoded]] = MappingProxyType(
    {
        "resnet": _encode_timm_resnet,
        "swin_transformer": _encode_timm_swin,
        "vision_transformer": _encode_timm_vit,
        "deit": _encode_timm_vit,
    }
)


@cache
def _torchvision_names() -> frozenset[str]:
    from torchvision import models

    return frozenset(models.list_models(module=models))


@cache
def _timm_names() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())
