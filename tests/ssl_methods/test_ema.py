from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from ssl_methods.ema import build_twin, update_twin


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_twin_of_a_constant_network_follows_the_closed_form() -> None:
    online, twin = network(0), build_twin(network(1))
    first = [value.clone() for value in twin.parameters()]
    momentum, steps = 0.9, 25
    for _ in range(steps):
        update_twin(twin, online, momentum=momentum)
    for now, start, goal in zip(twin.parameters(), first, online.parameters(), strict=True):
        expected = momentum**steps * start + (1 - momentum**steps) * goal
        torch.testing.assert_close(now, expected, rtol=1e-12, atol=1e-14)  # float64, 25 roundings


def test_high_momentum_is_not_rounded_away_in_single_precision() -> None:
    online, twin = nn.Linear(50, 50), nn.Linear(50, 50).requires_grad_(False)
    start = twin.weight.double()
    for _ in range(1000):
        update_twin(twin, online, momentum=0.9999)
    expected = 0.9999**1000 * start + (1 - 0.9999**1000) * online.weight.detach().double()
    # a thousand fp32 roundings of numbers below 0.15, and 1 - 0.9999 in fp32; no movement at all would be off by 0.01
    torch.testing.assert_close(twin.weight.double(), expected, rtol=0, atol=1e-5)


def test_equal_twin_does_not_move() -> None:
    online = network(0)
    twin = build_twin(online)
    update_twin(twin, online, momentum=0.3)
    for one, other in zip(twin.parameters(), online.parameters(), strict=True):
        assert torch.equal(one, other)


def test_momentum_one_holds_the_twin_and_zero_copies() -> None:
    online, twin = network(0), build_twin(network(1))
    start = [value.clone() for value in twin.parameters()]
    update_twin(twin, online, momentum=1.0)
    assert all(torch.equal(now, then) for now, then in zip(twin.parameters(), start, strict=True))
    update_twin(twin, online, momentum=0.0)
    assert all(torch.equal(now, goal) for now, goal in zip(twin.parameters(), online.parameters(), strict=True))


def test_buffers_are_copied_once_and_never_averaged() -> None:
    online = network(0)
    online(torch.randn(8, 3, dtype=torch.float64))
    twin = build_twin(online)
    copied = {name: value.clone() for name, value in twin.named_buffers()}
    assert all(torch.equal(copied[name], value) for name, value in online.named_buffers())
    online(torch.randn(8, 3, dtype=torch.float64))
    update_twin(twin, online, momentum=0.5)
    assert all(torch.equal(copied[name], value) for name, value in twin.named_buffers())
    assert not torch.equal(copied["1.running_mean"], online.get_buffer("1.running_mean"))


def test_twin_shares_nothing_and_asks_for_no_gradient() -> None:
    online = network(0)
    twin = build_twin(online)
    assert all(value.requires_grad for value in online.parameters())
    assert not any(value.requires_grad for value in twin.parameters())
    mine = {value.data_ptr() for value in online.state_dict().values()}
    assert not mine & {value.data_ptr() for value in twin.state_dict().values()}


def test_twin_never_drops_anything_in_training_mode() -> None:
    from timm.layers import DropPath

    online = nn.Sequential(nn.Dropout(0.5), StochasticDepth(0.5, mode="row"), DropPath(0.5), nn.Dropout2d(0.5)).train()
    x = torch.ones(64, 3, 2, 2)
    assert torch.equal(build_twin(online)(x), x)
    assert not torch.equal(online(x), x)


def test_another_network_is_no_twin() -> None:
    with pytest.raises(RuntimeError):
        update_twin(build_twin(nn.Linear(3, 4)), nn.Linear(3, 5), momentum=0.5)
