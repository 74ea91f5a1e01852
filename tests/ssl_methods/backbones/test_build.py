from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_methods.backbone import TokenBackbone
from ssl_methods.backbones.build import Headless, HeadlessTokens, build, exists, names, suggest

FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_32",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_network_gives_what_its_classifier_would_see(name: str) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = build(name)
        features = backbone(torch.empty(2, 3, 299, 299) if name == "inception_v3" else torch.empty(2, 3, 224, 224))
    assert features.shape == (2, backbone.embed_dim)
    assert all(module.p == 0 for module in backbone.modules() if isinstance(module, nn.Dropout))


def test_resnet_features_feed_the_original_classifier() -> None:
    from torchvision.models import resnet18

    whole = resnet18().eval()
    backbone = build("resnet18").eval()
    assert isinstance(backbone, Headless)
    backbone.network.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole.fc(backbone(images)), whole(images))


def test_resnet_blocks_start_as_the_identity() -> None:
    gammas = [value for name, value in build("resnet18").named_parameters() if name.endswith("bn2.weight")]
    assert len(gammas) == 8
    assert all(bool((gamma == 0).all()) for gamma in gammas)


def test_small_stem_keeps_the_resolution() -> None:
    with torch.device("meta"):
        backbone = build("resnet18", stem="small")
        assert isinstance(backbone, Headless)
        reached = []
        backbone.network.get_submodule("layer1").register_forward_hook(lambda *args: reached.append(args[2].shape))
        features = backbone(torch.empty(2, 3, 32, 32))
    assert features.shape == (2, 512)
    assert reached == [(2, 64, 32, 32)]


@pytest.mark.parametrize("name", ["vgg11", "tiny_resnet"])
def test_small_stem_is_for_torchvision_resnets(name: str) -> None:
    with pytest.raises(ValueError, match=f"backbone '{name}': stem 'small' is for torchvision ResNets; leave stem out"):
        build(name, stem="small")


def test_timm_network_has_no_classifier() -> None:
    backbone = build("test_resnet")
    features = backbone(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
def test_timm_network_that_widens_in_its_head_says_its_true_width(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = build(name)
        assert backbone(torch.empty(2, 3, 64, 64)).shape == (2, backbone.embed_dim)


def test_timm_vision_transformer_takes_the_crops_of_a_multi_crop_recipe_and_is_the_usual_one_at_its_size() -> None:
    import timm

    backbone = build("vit_tiny_patch16_224").eval()
    assert isinstance(backbone, Headless)
    usual = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    usual.load_state_dict(backbone.network.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(images), usual(images))
        assert backbone(images[:, :, :96, :96]).shape == (2, backbone.embed_dim)


def test_every_own_name_builds() -> None:
    assert "tiny_resnet" in names()
    for name in names():
        backbone = build(name)
        assert backbone(torch.zeros(2, 3, 28, 28)).shape == (2, backbone.embed_dim)


def test_names_of_all_three_sources_exist() -> None:
    assert [exists(name) for name in ("tiny_resnet", "resnet50", "test_resnet", "resnet5", "build")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_unknown_name_is_answered_with_close_ones() -> None:
    assert "resnet50" in suggest("resnet_50")
    with pytest.raises(ValueError, match=r"backbone 'tiny_resnets': .* did you mean tiny_resnet"):
        build("tiny_resnets")
    with pytest.raises(
        ValueError, match=rf"backbone '\?\?': .* did you mean {', '.join(names())}, resnet18, resnet50\?"
    ):
        build("??")


TOKEN_NETWORKS = [
    ("resnet18", 64, 4),
    ("swin_t", 64, 4),
    ("test_vit", 160, 100),
    ("tiny_swin", 28, 49),
    ("tiny_vit", 28, 49),
    ("tiny_resnet", 28, 16),
]


@pytest.mark.parametrize(("name", "side", "num_tokens"), TOKEN_NETWORKS)
def test_features_of_regions_are_those_that_the_features_come_from(name: str, side: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    backbone = build(name).eval()
    assert isinstance(backbone, TokenBackbone)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features, tokens = backbone.encode(images)
        assert torch.equal(backbone(images), features)
    assert tokens.shape == (2, num_tokens, backbone.embed_dim)
    if name != "test_vit":  # whose features are a token of their own
        torch.testing.assert_close(tokens.mean(dim=1), features)


def test_features_of_regions_leave_torchvisions_swin_as_it_is() -> None:
    from torchvision.models import swin_t

    torch.manual_seed(0)
    whole = swin_t().eval()
    backbone = build("swin_t").eval()
    assert isinstance(backbone, Headless)
    backbone.network.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(whole.head(backbone(images)), whole(images))


@pytest.mark.parametrize("window", [7, 14])
def test_e11_swin_takes_both_crops_of_the_published_recipe_with_either_window(window: int) -> None:
    import timm

    with torch.device("meta"):
        backbone = build("swin_tiny_patch4_window7_224", window=window)
        usual = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, window_size=window)
        assert isinstance(backbone, HeadlessTokens)
        tokens = [backbone.encode(torch.empty(2, 3, side, side)).tokens for side in (224, 96)]
    assert [each.shape for each in tokens] == [(2, 49, 768), (2, 9, 768)]
    shapes, usual_shapes = ({k: v.shape for k, v in each.state_dict().items()} for each in (backbone.network, usual))
    assert shapes == usual_shapes


def test_timms_swin_is_the_usual_one_at_its_size() -> None:
    import timm

    torch.manual_seed(0)
    small = {"embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2), "img_size": 56}
    usual = timm.models.swin_transformer.SwinTransformer(num_classes=0, **small).eval()
    ours = timm.models.swin_transformer.SwinTransformer(num_classes=0, dynamic_img_size=True, **small).eval()
    ours.load_state_dict(usual.state_dict())
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(usual(images), ours(images))


def test_window_is_for_networks_that_have_one() -> None:
    assert build("tiny_swin", window=4)(torch.zeros(1, 3, 16, 16)).shape == (1, 96)
    for name in ("tiny_vit", "resnet18", "swin_t", "test_vit"):
        with pytest.raises(ValueError, match=rf"backbone '{name}': window 7: .* take cvt_tiny, tiny_swin, vil_tiny or"):
            build(name, window=7)
