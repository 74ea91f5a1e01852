import pytest
import torch
from torch import nn

from orchestrate.config.run import AdamWConfig, LarsConfig, SgdConfig
from orchestrate.engine.optim import Lars, build_optimizer, set_learning_rates


def lars_step(weight: list[float], gradient: list[float], *, weight_decay: float) -> list[float]:
    parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = Lars([{"params": [parameter], "weight_decay": weight_decay}], lr=1.0, momentum=0.9, trust=0.001)
    parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    optimizer.step()
    return (torch.tensor([weight], dtype=torch.float64) - parameter.detach())[0].tolist()


def test_lars_without_decay_takes_the_published_step() -> None:
    assert lars_step([3, 4], [0, 1], weight_decay=0.0) == pytest.approx([0, 0.005], abs=1e-12)


def test_lars_adds_decay_before_the_trust_ratio() -> None:
    assert lars_step([3, 4], [0, 1], weight_decay=0.1) == pytest.approx([0.001047645, 0.004889012], abs=1e-9)


def test_lars_momentum_buffer_holds_no_learning_rate() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Lars([{"params": [parameter], "adapt": False}], lr=1.0, momentum=0.9, trust=0.001)
    for lr in (1.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    assert parameter.item() == pytest.approx(-1.19, abs=1e-12)


@pytest.mark.parametrize(("weight", "gradient"), [([0.0, 0.0], [0.0, 1.0]), ([3.0, 4.0], [0.0, 0.0])])
def test_lars_with_a_zero_norm_takes_a_plain_step(weight: list[float], gradient: list[float]) -> None:
    assert lars_step(weight, gradient, weight_decay=0.0) == pytest.approx(gradient)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "config", [SgdConfig(name="sgd", lr=0.1, weight_decay=0.5), AdamWConfig(name="adamw", lr=0.1, weight_decay=0.5)]
)
def test_vectors_are_not_decayed(config: SgdConfig | AdamWConfig) -> None:
    optimizer = build_optimizer(config, module(), global_batch=256)
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {2: 0.5, 1: 0.0}


def test_learning_rates_scale_with_the_global_batch() -> None:
    config = LarsConfig(name="lars", lr=0.2, bias_lr=0.0048)
    optimizer = build_optimizer(config, module(), global_batch=2048)
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.0192])


def test_frozen_parameters_are_left_out() -> None:
    frozen = module().requires_grad_(False)
    frozen[0].weight.requires_grad_(True)
    optimizer = build_optimizer(SgdConfig(name="sgd", lr=0.1), frozen, global_batch=256)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
