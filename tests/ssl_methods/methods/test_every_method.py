"""What holds for every method; a new file in ssl_methods/methods is tested by itself."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from functools import cache
from itertools import product
from typing import Any, get_args, get_type_hints

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssl_methods import plugins
from ssl_methods.backbone import Backbone
from ssl_methods.backbones.tiny_binary import TinyBinary
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.collectives import RankBatchNorm, rank, world_size
from ssl_methods.method import Method, Progress
from ssl_methods.teacher import Teacher
from ssl_methods.views import recipe, recipe_names
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice
from tests.ssl_methods.methods_page import describe

PACKAGE = "ssl_methods.methods"
NAMES = plugins.names(PACKAGE)
CLASSES = {name: plugins.load(PACKAGE, name) for name in NAMES}
RANK_BOUND = [name for name in NAMES if CLASSES[name].rank_bound]
STAGED = [name for name in NAMES if CLASSES[name].num_stages is not Method.num_stages]
WITH_WEIGHTS = [name for name in NAMES if CLASSES[name].pretrained is not Method.pretrained]
# what a tiny run asks of a method that has the knob
SMALL = {
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_classes": 4,
    "queue_size": 64,
    "output_dim": 32,
    "num_prototypes": 32,
    "bottleneck_dim": 8,
    "deputy": "median",  # of as few negatives as four ranks leave
    "margin": 6.0,  # the least that keeps the hinge open, so that the loss is not all constant
    "teacher": "tiny_resnet",
    "teacher_hidden_dim": 24,
    "teacher_weights": "random",
    "mode": "contrastive_distillation",  # in which every part of the method has something to do
}


def build_method(name: str, *, seed: int = 0, backbone: type[Backbone] = TinyResNet, **knobs: Any) -> Method:
    torch.manual_seed(seed)
    chosen = plugins.load(PACKAGE, name)
    known = inspect.signature(chosen).parameters
    method = chosen(backbone(), **{key: value for key, value in (SMALL | knobs).items() if key in known})
    assert isinstance(method, Method)
    return method


def build_staged(name: str, *, seed: int = 0) -> Method:
    """Build a method so that its training has two stages: with some choice of a knob, on some backbone."""
    hints = get_type_hints(plugins.load(PACKAGE, name).__init__, include_extras=True)
    choices = [{knob: value} for knob, hint in hints.items() for value in get_args(hint) if isinstance(value, str)]
    for backbone, knobs in product([TinyResNet, TinyBinary], [{}, *choices]):
        with suppress(ValueError):  # a choice that does not go with the others
            method = build_method(name, seed=seed, backbone=backbone, **knobs)
            if method.num_stages > 1:
                return method
    raise AssertionError(f"{name}: no choice of a knob gives it a second stage")


def batch_of(method: Method, *, num_samples: int = 16, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any]:
    """This rank's part of noisy corners of fixed random images, in the numbers and sizes of the method's recipe, and
    of labels if the method wants them.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_samples, 3, 12, 12, generator=generator, dtype=dtype)
    sides = [round(12 * view.size_factor) for view in recipe(method.default_views, 12).views]
    noise = [torch.randn(images.shape, generator=generator, dtype=dtype) for _ in sides]
    views = [(images + 0.2 * each)[:, :, :side, :side] for each, side in zip(noise, sides, strict=True)]
    labels = rank_slice(torch.arange(num_samples) % 4, rank(), world_size()) if method.uses_labels else None
    return [rank_slice(view, rank(), world_size()) for view in views], labels


def train(
    method: Method,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    first: int = 0,
    stage: int = 0,
    model: nn.Module | None = None,
) -> list[float]:
    """Take steps on one batch as the engine does; `model` is what wraps the method."""
    views, labels = batch_of(method)
    losses = []
    for step in range(first, first + steps):
        method.before_step(progress(step, stage))
        output = (model or method)(views, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(progress(step + 1, stage))
        losses.append(output.loss.item())
    return losses


def progress(step: int, stage: int = 0) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=5.0, stage=stage)


def adamw(method: Method) -> torch.optim.AdamW:
    # every parameter, frozen ones too: whatever gets no gradient must stay
    return torch.optim.AdamW(method.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_lower_the_loss(name: str) -> None:
    method = build_method(name)
    batch = batch_of(method)
    untrained = [method(*batch).loss.item() for _ in range(40)]  # until queue and centre have settled
    losses = train(method, adamw(method), steps=20)
    assert losses[-1] < 0.9 * untrained[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_learns(name: str) -> None:
    method = build_method(name)
    before = copy.deepcopy(dict(method.named_parameters()))
    taught = [value for part in method.modules() if isinstance(part, Teacher) for value in part.parameters()]
    train(method, adamw(method), steps=20)  # the first steps only open the blocks that start as the identity
    for parameter_name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        stays = any(parameter is each for each in taught)
        assert torch.equal(parameter, before[parameter_name]) == stays, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_move_after_the_step_and_by_nothing_else(name: str) -> None:
    method = build_method(name)
    frozen = {key: value for key, value in method.named_parameters() if not value.requires_grad}
    before = copy.deepcopy(frozen)
    optimizer = adamw(method)
    for step in range(3):
        method.before_step(progress(step))
        method(*batch_of(method)).loss.backward()
        optimizer.step()
    assert bool(frozen) == method.has_twin
    assert all(value.grad is None and torch.equal(value, before[key]) for key, value in frozen.items())
    method.after_step(progress(3))
    assert not frozen or any(not torch.equal(value, before[key]) for key, value in frozen.items())


def as_restored(method: Method, into: Method, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Put what a checkpoint keeps of a training into another method, and return that one's optimizer."""
    random_state = torch.get_rng_state()  # what a method draws inside a step comes from a generator that is kept, too
    into.load_state_dict(safetensors.torch.load(safetensors.torch.save(method.state_dict())))
    restored = adamw(into)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.set_rng_state(random_state)
    return restored


@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_as_if_nothing_happened(name: str) -> None:
    method = build_method(name)
    optimizer = adamw(method)
    train(method, optimizer, steps=3)
    restored = build_method(name, seed=1)  # of which nothing is left
    restored_optimizer = as_restored(method, restored, optimizer)
    assert train(restored, restored_optimizer, steps=3, first=3) == train(method, optimizer, steps=3, first=3)
    for key, value in method.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_from_the_progress_has_no_memory(name: str) -> None:
    straight, detour = build_method(name), build_method(name)
    straight.before_step(progress(3))
    for step in (19, 3):
        detour.before_step(progress(step))
    assert torch.equal(straight(*batch_of(straight)).loss, detour(*batch_of(detour)).loss)


@pytest.mark.parametrize("name", STAGED)
def test_stages_meet_at_a_checkpoint_as_anywhere(name: str) -> None:
    method = build_staged(name)
    optimizer = adamw(method)
    train(method, optimizer, steps=3)
    restored = build_staged(name, seed=1)
    restored.before_step(progress(9, stage=1))  # a stage leaves nothing behind but what the state holds
    restored.before_step(progress(0, stage=0))
    restored_optimizer = as_restored(method, restored, optimizer)
    losses = train(method, optimizer, steps=3, first=3, stage=1)
    assert train(restored, restored_optimizer, steps=3, first=3, stage=1) == losses
    for key, value in method.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", STAGED)
def test_second_stage_is_another_one(name: str) -> None:
    losses = []
    for stage in (0, 1):
        method = build_staged(name)
        method.before_step(progress(10, stage=stage))
        losses.append(method(*batch_of(method)).loss.item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", NAMES)
def test_output_is_a_single_precision_loss_and_detached_scalars(name: str) -> None:
    method = build_method(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(*batch_of(method))
    output.loss.backward()
    for key, parameter in method.named_parameters():
        assert not parameter.requires_grad or bool(parameter.grad.isfinite().all()), key
    assert output.loss.dtype == torch.float32
    assert "embedding_std" in output.metrics
    for metric, value in output.metrics.items():
        assert (value.shape, value.requires_grad) == ((), False), metric
        assert bool(value.isfinite()), metric


@pytest.mark.parametrize("name", NAMES)
def test_two_forward_passes_before_one_backward_pass(name: str) -> None:
    method = build_method(name)
    first, second = (method(*batch_of(method)) for _ in range(2))  # the second must not touch what the first keeps
    (first.loss + second.loss).backward()
    for key, value in method.named_parameters():
        assert not value.requires_grad or (value.grad is not None and bool(value.grad.isfinite().all())), key


@pytest.mark.parametrize("name", NAMES)
def test_declarations_are_complete(name: str) -> None:
    method = build_method(name)
    assert method.default_views in recipe_names()
    assert method.encoder().embed_dim == 128
    assert all(isinstance(each, str) for each in method.rank_bound)
    trained = {id(value) for value in method.parameters() if value.requires_grad}
    assert bool(method.last_layer()) == method.has_last_layer
    assert all(id(value) in trained for value in method.last_layer())
    views, _ = batch_of(method)
    for num_ranks in (1, 2):
        method.check_batches(num_views=len(views), global_batch=16, num_ranks=num_ranks)
        advice = method.advice(global_batch=16, num_ranks=num_ranks)
        assert isinstance(advice, tuple)
        assert all(line and "\n" not in line for line in advice)
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    assert method.rank_bound or all(isinstance(norm, RankBatchNorm) for norm in norms)


@pytest.mark.parametrize("name", NAMES)
def test_encoder_in_evaluation_mode_changes_nothing(name: str) -> None:
    method = build_method(name)
    before = copy.deepcopy(method.state_dict())
    images = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        features = method.encoder().eval()(images)
        torch.testing.assert_close(method.encoder()(images[:1]), features[:1], rtol=1e-4, atol=1e-5)  # image by image
    assert bool(features.isfinite().all())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_to_begin_with_that_are_missing_are_named_and_nothing_is_trained_against_them(name: str) -> None:
    knobs = {knob: "nowhere/weights.safetensors" for knob in knobs_of(name) if knob.endswith("_weights")}
    method = build_method(name, **knobs)
    assert method.pretrained() == knobs
    said: list[str] = []
    with pytest.raises(ValueError, match=f"^{next(iter(knobs))}: nowhere/weights.safetensors: "):
        method.load_pretrained(said.append)
    with pytest.raises(RuntimeError, match="not loaded"):
        method(*batch_of(method))
    assert said == []
    untrained = build_method(name)
    assert untrained.pretrained() == {}
    untrained.load_pretrained(said.append)
    assert len(said) == 1


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_equation_say_what_the_page_of_methods_shows(name: str) -> None:
    method = plugins.load(PACKAGE, name)
    described = describe(method)
    assert list(described.knobs) == knobs_of(name)
    assert described.source
    assert described.differs
    assert method.equation.startswith("L = ")  # type: ignore[attr-defined]  # of a method, which `load` cannot know
    assert "\n" not in method.equation  # type: ignore[attr-defined]


def knobs_of(name: str) -> list[str]:
    return list(inspect.signature(plugins.load(PACKAGE, name)).parameters)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_constructor_is_a_config_schema(name: str) -> None:
    backbone, *knobs = inspect.signature(plugins.load(PACKAGE, name)).parameters.values()
    assert backbone.name == "backbone"
    for knob in knobs:
        assert knob.kind is inspect.Parameter.KEYWORD_ONLY, knob.name
        assert knob.annotation is not inspect.Parameter.empty, knob.name
        assert not isinstance(knob.annotation, str), knob.name


Stepped = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


@cache
def steps_on_ranks(num_ranks: int) -> list[dict[str, Stepped]]:
    """What each rank has after a step of each method; starting ranks costs more than all the steps do."""
    return run_on_ranks(num_ranks, steps_on_this_rank)


def steps_on_this_rank() -> dict[str, Stepped]:
    return {name: step_on_this_rank(name) for name in NAMES}


def step_on_this_rank(name: str) -> Stepped:
    """Loss, gradients and buffers after one float64 step on this rank's part of a batch of 8."""
    method = build_method(name).double()
    output = method(*batch_of(method, num_samples=8, dtype=torch.float64))
    output.loss.backward()
    gradients = {key: value.grad for key, value in method.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients, dict(method.named_buffers())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANK_BOUND])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_process(name: str, num_ranks: int) -> None:
    loss, gradients, buffers = step_on_this_rank(name)
    results = [steps[name] for steps in steps_on_ranks(num_ranks)]
    for rank_loss, _, rank_buffers in results:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-9, atol=0)  # float64 through five layers of moments
        for key, value in buffers.items():
            torch.testing.assert_close(rank_buffers[key], value, rtol=1e-9, atol=1e-12)
    for key, value in gradients.items():
        average = torch.stack([rank_gradients[key] for _, rank_gradients, _ in results]).mean(0)
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", RANK_BOUND)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rank_bound_method_differs_from_one_process_and_is_one_method_on_all_ranks(name: str, num_ranks: int) -> None:
    loss, _, _ = step_on_this_rank(name)
    results = [steps[name] for steps in steps_on_ranks(num_ranks)]
    assert float(results[0][0]) != pytest.approx(float(loss), rel=1e-6)
    moments = {key for key, _ in batch_norm_buffers(build_method(name))}
    for rank_loss, _, rank_buffers in results:
        assert torch.equal(rank_loss, results[0][0])
        for key in rank_buffers.keys() - moments:
            assert torch.equal(rank_buffers[key], results[0][2][key]), key


def batch_norm_buffers(method: Method) -> list[tuple[str, Tensor]]:
    norms = [(prefix, module) for prefix, module in method.named_modules() if isinstance(module, _BatchNorm)]
    return [pair for prefix, norm in norms for pair in norm.named_buffers(prefix=prefix)]


def train_on_this_rank(names: list[str]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and state of three steps of each method under DDP, behind two forward passes and one backward pass."""
    results = []
    for name in names:
        method = build_method(name)
        model = DistributedDataParallel(method, broadcast_buffers=False)
        first, second = (model(*batch_of(method)) for _ in range(2))
        (first.loss + second.loss).backward()
        results.append((train(method, adamw(method), steps=3, model=model), method.state_dict()))
    return results


def test_ranks_stay_one_method_under_ddp() -> None:
    ranks = run_on_ranks(2, train_on_this_rank, list(NAMES))
    for name, (losses, state), (other_losses, other_state) in zip(NAMES, *ranks, strict=True):
        assert losses == other_losses, name
        local = {key for key, _ in batch_norm_buffers(build_method(name))} if name in RANK_BOUND else set()
        different = {key for key, value in state.items() if not torch.equal(value, other_state[key])}
        assert different <= local, name
