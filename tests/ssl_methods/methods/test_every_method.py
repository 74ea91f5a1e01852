"""What holds for every method; a new file in ssl_methods/methods is tested by itself."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_methods import plugins
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.collectives import RankBatchNorm, rank, world_size
from ssl_methods.method import Method, Progress
from ssl_methods.views import recipe, recipe_names
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

PACKAGE = "ssl_methods.methods"
NAMES = plugins.names(PACKAGE)
SMALL = {"embed_dim": 16, "hidden_dim": 24, "num_classes": 4}  # what a tiny run asks of a method that has the knob


def build_method(name: str) -> Method:
    torch.manual_seed(0)
    chosen = plugins.load(PACKAGE, name)
    known = inspect.signature(chosen).parameters
    method = chosen(TinyResNet(), **{key: value for key, value in SMALL.items() if key in known})
    assert isinstance(method, Method)
    return method


def batch_of(method: Method, *, num_samples: int = 16, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any]:
    """Two noisy views (as many as the recipe makes) of fixed random images, and labels if the method wants them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_samples, 3, 12, 12, generator=generator, dtype=dtype)
    num_views = len(recipe(method.default_views, 12).views)
    views = [images + 0.2 * torch.randn(images.shape, generator=generator, dtype=dtype) for _ in range(num_views)]
    return views, torch.arange(num_samples) % 4 if method.uses_labels else None


def train(method: Method, optimizer: torch.optim.Optimizer, *, steps: int) -> list[float]:
    views, labels = batch_of(method)
    losses = []
    for step in range(steps):
        output = method(views, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(Progress(step=step + 1, total_steps=20, steps_per_epoch=5.0))
        losses.append(output.loss.item())
    return losses


def sgd(method: Method) -> torch.optim.SGD:
    return torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_lower_the_loss(name: str) -> None:
    method = build_method(name)
    losses = train(method, sgd(method), steps=20)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_learns(name: str) -> None:
    method = build_method(name)
    before = copy.deepcopy(dict(method.named_parameters()))
    train(method, sgd(method), steps=20)  # the first steps only open the blocks that start as the identity
    for parameter_name, parameter in method.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_as_if_nothing_happened(name: str) -> None:
    method = build_method(name)
    optimizer = sgd(method)
    train(method, optimizer, steps=3)
    restored = build_method(name)
    restored.load_state_dict(copy.deepcopy(method.state_dict()))
    restored_optimizer = sgd(restored)
    restored_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(restored, restored_optimizer, steps=3) == train(method, optimizer, steps=3)
    for key, value in method.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_output_is_a_single_precision_loss_and_detached_scalars(name: str) -> None:
    method = build_method(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(*batch_of(method))
    assert output.loss.dtype == torch.float32
    assert "embedding_std" in output.metrics
    for metric, value in output.metrics.items():
        assert (value.shape, value.requires_grad) == ((), False), metric
        assert bool(value.isfinite()), metric


@pytest.mark.parametrize("name", NAMES)
def test_declarations_are_complete(name: str) -> None:
    method = build_method(name)
    assert method.default_views in recipe_names()
    assert method.encoder().embed_dim == 128
    assert all(isinstance(each, str) for each in method.rank_bound)
    norms = [module for module in method.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, RankBatchNorm) for norm in norms)


@pytest.mark.parametrize("name", NAMES)
def test_constructor_is_a_config_schema(name: str) -> None:
    backbone, *knobs = inspect.signature(plugins.load(PACKAGE, name)).parameters.values()
    assert backbone.name == "backbone"
    for knob in knobs:
        assert knob.kind is inspect.Parameter.KEYWORD_ONLY, knob.name
        assert knob.annotation is not inspect.Parameter.empty, knob.name
        assert not isinstance(knob.annotation, str), knob.name


def step_on_this_rank(name: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers after one float64 step on this rank's part of a batch of 8."""
    method = build_method(name).double()
    views, labels = batch_of(method, num_samples=8, dtype=torch.float64)
    mine = [rank_slice(view, rank(), world_size()) for view in views]
    output = method(mine, None if labels is None else rank_slice(labels, rank(), world_size()))
    output.loss.backward()
    gradients = {key: value.grad for key, value in method.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients, dict(method.named_buffers())


@pytest.mark.parametrize("name", [name for name in NAMES if not plugins.load(PACKAGE, name).rank_bound])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(name: str, num_ranks: int) -> None:
    loss, gradients, buffers = step_on_this_rank(name)
    results = run_on_ranks(num_ranks, step_on_this_rank, name)
    for rank_loss, _, rank_buffers in results:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-9, atol=0)  # float64 through five layers of moments
        for key, value in buffers.items():
            torch.testing.assert_close(rank_buffers[key], value, rtol=1e-9, atol=1e-12)
    for key, value in gradients.items():
        average = torch.stack([rank_gradients[key] for _, rank_gradients, _ in results]).mean(0)
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
