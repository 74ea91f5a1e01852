"""Recomputing changes memory, never numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import models

from ssl_methods.backbone import Backbone
from ssl_methods.backbones import build
from ssl_methods.collectives import synchronise_batch_norm
from ssl_methods.method import Method
from ssl_methods.methods.barlow_twins import BarlowTwins
from ssl_methods.methods.esvit import EsViT
from ssl_methods.methods.simclr import SimCLR
from ssl_methods.recompute import recompute_blocks, recompute_in_parts
from tests.distributed import run_on_ranks


class LayerNormNet(Backbone):
    """Convolutions without batch norm, with dropout if asked."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim = 24
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2), nn.GroupNorm(4, 24), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(24, 24, 3)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).mean(dim=(2, 3))


def views(dtype: torch.dtype, num_samples: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_samples, 3, 16, 16, generator=generator, dtype=dtype) for _ in range(2)]


def step_of(method: Method, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = method.to(dtype)(views(dtype))
    output.loss.backward()
    gradients = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients


def barlow(backbone: Backbone) -> Method:
    return BarlowTwins(backbone, embed_dim=16)


def simclr(backbone: Backbone) -> Method:
    return SimCLR(backbone, embed_dim=16, hidden_dim=24)


@pytest.mark.parametrize("make", [barlow, simclr])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(make: Callable[[Backbone], Method], size: int) -> None:
    results = []
    for parts in (False, True):
        torch.manual_seed(0)
        method = make(LayerNormNet())
        if parts:
            recompute_in_parts(method.backbone, size)
        results.append(step_of(method, torch.float64))
    (loss, gradients), (part_loss, part_gradients) = results
    torch.testing.assert_close(part_loss, loss, rtol=1e-12, atol=0)
    assert gradients.keys() == part_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(part_gradients[name], value, rtol=1e-9, atol=1e-12)  # float64 sums in another order


def step_on_ranks(size: int) -> dict[str, torch.Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    from ssl_methods.collectives import rank, world_size

    torch.manual_seed(0)
    method = barlow(LayerNormNet()).double()
    if size:
        recompute_in_parts(method.backbone, size)
    parallel = DistributedDataParallel(method)
    parallel([view.tensor_split(world_size())[rank()] for view in views(torch.float64)]).loss.backward()
    return {name: value.grad for name, value in method.named_parameters() if value.grad is not None}


def _steps_on_ranks() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return step_on_ranks(0), step_on_ranks(2)


def test_parts_under_ddp_give_the_gradient_of_one_process_on_the_whole_batch() -> None:
    torch.manual_seed(0)
    _, expected = step_of(barlow(LayerNormNet()), torch.float64)
    for gradients in run_on_ranks(2, _steps_on_ranks)[0]:
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-6, atol=1e-10)


def test_recomputed_dropout_drops_the_same_units() -> None:
    method = barlow(LayerNormNet(dropout=0.5))
    recompute_in_parts(method.backbone, 4)
    images = views(torch.float64)[0].float()
    torch.manual_seed(1)
    method.backbone(images).square().sum().backward()
    got = method.backbone.layers[0].weight.grad.clone()
    method.backbone.zero_grad()
    torch.manual_seed(1)
    plain = LayerNormNet.forward
    torch.cat([plain(method.backbone, part) for part in images.split(4)]).square().sum().backward()
    torch.testing.assert_close(got, method.backbone.layers[0].weight.grad)


def test_batch_norm_refuses_parts_and_is_named() -> None:
    with pytest.raises(ValueError, match=r"stem\.1 \(BatchNorm2d\) sees the whole batch"):
        recompute_in_parts(build.build("tiny_resnet"), 4)


def three_steps(method: Method) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        output = method(views(torch.float32))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses, method.state_dict()


def test_recomputed_blocks_train_to_the_same_bits_running_statistics_included() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        method = barlow(build.build("tiny_resnet"))
        if recompute:
            assert recompute_blocks(method.backbone) == 3
        results.append(three_steps(method))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(results[1][1][name], value), name


def _train_on_ranks() -> list[dict[str, torch.Tensor]]:
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        method = synchronise_batch_norm(barlow(build.build("tiny_resnet")))
        if recompute:
            recompute_blocks(method.backbone)
        states.append(three_steps(method)[1])
    return states


def test_batch_norm_over_ranks_is_recomputed_to_the_same_bits() -> None:
    plain, recomputed = run_on_ranks(2, _train_on_ranks)[0]
    assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("resnet50", 16), ("vit_b_16", 12), ("swin_t", 12), ("convnext_tiny", 18), ("efficientnet_b0", 16)],
)
def test_residual_blocks_of_known_networks_are_found(name: str, num_blocks: int) -> None:
    with torch.device("meta"):
        assert recompute_blocks(models.get_model(name, weights=None)) == num_blocks


@pytest.mark.parametrize(("name", "num_blocks"), [("vit_tiny_patch16_224", 12), ("convnext_atto", 12), ("resnet18", 8)])
def test_residual_blocks_of_timm_networks_are_found(name: str, num_blocks: int) -> None:
    import timm

    with torch.device("meta"):
        assert recompute_blocks(timm.create_model(name, pretrained=False)) == num_blocks


def test_frozen_or_evaluated_networks_compute_once() -> None:
    backbone = LayerNormNet()
    recompute_in_parts(backbone, 4)
    backbone.eval()
    images = views(torch.float32)[0]
    assert torch.equal(backbone(images), LayerNormNet.forward(backbone, images))


def test_parts_and_blocks_keep_the_features_of_regions_too() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        method = EsViT(build.build("tiny_swin"), embed_dim=16, hidden_dim=24, output_dim=32)
        seen: list[int] = []
        method.backbone.patches.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(len(x[0])))
        if recompute:
            assert recompute_blocks(method.backbone) == 4
            recompute_in_parts(method.backbone, 10)
        results.append((*step_of(method, torch.float64), seen))
    (loss, gradients, whole), (got_loss, got_gradients, parts) = results
    assert (whole, parts[:3]) == ([24], [10, 10, 4])
    torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-6, atol=1e-10)
