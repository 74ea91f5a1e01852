import pytest
import torch
from torch import nn

from orchestrate.engine.precision import LossScale


def grad_scaler_values(overflows: list[bool]) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=LossScale.growth_steps)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    values = []
    for overflowed in overflows:
        scaler.scale(weight.sum())  # it makes its scale at the first use
        weight.grad = torch.full_like(weight, float("inf") if overflowed else 1.0)
        scaler.step(optimizer)
        scaler.update()
        values.append(scaler.get_scale())
    return values


def test_loss_scale_moves_as_torchs_grad_scaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "growth_steps", 3)
    overflows = [False, True, False, False, False, False, True, True, False, False, False, False, False, False]
    scale = LossScale(dynamic=True)
    values = []
    for overflowed in overflows:
        scale.update(overflowed)
        values.append(scale.value)
    assert values == grad_scaler_values(overflows)


def test_loss_scale_goes_on_from_its_state() -> None:
    scale, other = LossScale(dynamic=True), LossScale(dynamic=True)
    for step in range(3000):
        scale.update(step == 500)
    other.load(scale.state())
    for each in (scale, other):
        for _ in range(2000):
            each.update(False)
    assert other.state() == scale.state()
    assert other.value == 2.0**17


def test_loss_scale_stays_at_1_or_above() -> None:
    scale = LossScale(dynamic=True)
    for _ in range(40):
        scale.update(True)
    assert scale.value == 1.0


def test_constant_loss_scale_is_1_and_touches_no_loss() -> None:
    scale, loss = LossScale(dynamic=False), torch.ones(())
    scale.update(True)
    assert (scale.value, scale.state(), scale.scaled(loss) is loss) == (1.0, {}, True)
