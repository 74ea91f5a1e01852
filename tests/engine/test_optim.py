from typing import Any

import pytest
import torch
from torch import nn

from orchestrate.config.optim import AdamConfig, AdamWConfig, LarsConfig, OptimConfig, SgdConfig
from orchestrate.engine.optim import Lars, build_optimizer, set_rates


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def decay_by_axes(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {each.ndim: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}


def steps_of(optimizer: Lars, parameter: nn.Parameter, learning_rates: list[float]) -> float:
    for lr in learning_rates:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return float(parameter.detach())


# Published: two steps with gradient 1, momentum 0.9, learning rate 1 and then 0.1, from 0.
@pytest.mark.parametrize(("lr_in_buffer", "end"), [(False, -1.19), (True, -2.0)])
def test_variants_of_lars_differ_in_how_a_fall_of_the_learning_rate_acts(lr_in_buffer: bool, end: float) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Lars([parameter], lr=1.0, momentum=0.9, lr_in_buffer=lr_in_buffer)
    assert steps_of(optimizer, parameter, [1.0, 0.1]) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("lr_in_buffer", [False, True])
def test_lars_without_trust_ratios_is_sgd_at_a_constant_learning_rate(lr_in_buffer: bool) -> None:
    ours, plain = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Lars([ours], lr=0.1, momentum=0.9, lr_in_buffer=lr_in_buffer)
    sgd: Any = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    assert steps_of(optimizer, ours, [0.1] * 5) == pytest.approx(steps_of(sgd, plain, [0.1] * 5), abs=1e-6)  # rounding


@pytest.mark.parametrize(
    "config",
    [
        SgdConfig(name="sgd", lr=0.1, weight_decay=0.5),
        AdamWConfig(name="adamw", lr=0.1, weight_decay=0.5),
        AdamConfig(name="adam", lr=0.1, weight_decay=0.5),
        LarsConfig(name="lars", lr=0.1, bias_lr=0.1, weight_decay=0.5),
    ],
)
def test_vectors_are_not_decayed(config: Any) -> None:
    assert decay_by_axes(build_optimizer(config, module(), global_batch=256)) == {2: 0.5, 1: 0.0}


def test_vectors_are_decayed_where_that_is_asked_for() -> None:
    config = SgdConfig(name="sgd", lr=0.1, weight_decay=0.5, decay_vectors=True)
    assert decay_by_axes(build_optimizer(config, module(), global_batch=256)) == {2: 0.5, 1: 0.5}


def test_learning_rates_scale_with_the_global_batch() -> None:
    config = LarsConfig(name="lars", lr=0.2, bias_lr=0.0048)
    optimizer = build_optimizer(config, module(), global_batch=2048)
    assert set_rates(optimizer, lr_factor=0.5, weight_decay=0.0, frozen=False) == pytest.approx(0.8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.0192])


def test_scheduled_weight_decay_is_for_the_groups_that_decay() -> None:
    optimizer = build_optimizer(SgdConfig(name="sgd", lr=0.1, weight_decay=0.5), module(), global_batch=256)
    set_rates(optimizer, lr_factor=1.0, weight_decay=0.7, frozen=False)
    assert decay_by_axes(optimizer) == {2: 0.7, 1: 0.0}


def test_untrained_parameters_are_left_out() -> None:
    frozen = module().requires_grad_(False)
    frozen[0].weight.requires_grad_(True)
    optimizer = build_optimizer(SgdConfig(name="sgd", lr=0.1), frozen, global_batch=256)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


# From weight 2 with decay 0.5 and without a gradient: Adam's gradient is 0.5 * 2, of which its first step makes 1;
# AdamW takes lr * 0.5 * 2 off.
@pytest.mark.parametrize(
    ("config", "end"),
    [
        (AdamConfig(name="adam", lr=0.1, weight_decay=0.5), 2 - 0.1),
        (AdamConfig(name="adam", lr=0.1, weight_decay=5.0), 2 - 0.1),
        (AdamWConfig(name="adamw", lr=0.1, weight_decay=0.5), 2 * (1 - 0.1 * 0.5)),
        (AdamWConfig(name="adamw", lr=0.1, weight_decay=5.0), 2 * (1 - 0.1 * 5.0)),
    ],
)
def test_weight_decay_of_adam_is_a_part_of_the_gradient(config: Any, end: float) -> None:
    matrix = nn.Parameter(torch.full((1, 1), 2.0, dtype=torch.float64))
    optimizer = build_optimizer(config, nn.ParameterList([matrix]), global_batch=256)
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    assert float(matrix) == pytest.approx(end, abs=1e-8)  # Adam's epsilon


CONFIGS: list[OptimConfig] = [
    SgdConfig(name="sgd", lr=0.1, weight_decay=0.5),
    AdamWConfig(name="adamw", lr=0.1, weight_decay=0.5),
    AdamConfig(name="adam", lr=0.1, weight_decay=0.5),
    LarsConfig(name="lars", lr=0.1, bias_lr=0.1, variant="triplet"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_last_layer_is_held_still_and_then_begins_afresh(config: Any) -> None:
    torch.manual_seed(0)
    network = module()
    last, gradients = network[2].weight, {}
    optimizer = build_optimizer(config, network, global_batch=256, last_layer=[last])
    alone = nn.Parameter(last.detach().clone())
    fresh = build_optimizer(config, nn.ParameterList([alone]), global_batch=256)
    before = last.detach().clone()
    for step in range(5):
        for parameter in network.parameters():
            parameter.grad = gradients[parameter] = torch.randn_like(parameter)
        set_rates(optimizer, lr_factor=1.0, weight_decay=0.5, frozen=step < 3)
        optimizer.step()
        if step < 3:
            assert torch.equal(last, before)
        else:
            alone.grad = gradients[last].clone()
            set_rates(fresh, lr_factor=1.0, weight_decay=0.5, frozen=False)
            fresh.step()
    assert torch.equal(last, alone)
    assert not torch.equal(last, before)
