from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_methods.backbones.tiny_binary import TinyBinary
from ssl_methods.binary import (
    BinaryConv2d,
    RPReLU,
    RSign,
    binarise_weights,
    binarised,
    binary_convolutions,
    is_binary,
    make_weights_positive,
    sign_of_activations,
)
from ssl_methods.recompute import residual_blocks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolution(input_dim: int = 3, output_dim: int = 4, *, stride: int = 1, scale: float = 0.3) -> BinaryConv2d:
    layer = BinaryConv2d(input_dim, output_dim, 3, stride=stride).double()
    with torch.no_grad():
        layer.weight.copy_(scale * random(*layer.weight.shape))
    return layer


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(function(x.requires_grad_()), x, upstream)
    return gradient


def seen_by(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the weights that a convolution uses: its answers to inputs with a single one."""
    probe = torch.eye(27, dtype=torch.float64).view(27, 3, 3, 3)
    assert x.shape == probe.shape
    return layer(probe)[:, :, 1, 1].T.reshape(-1, 3, 3, 3)


def test_s1_activations_are_minus_one_zero_and_one_and_weights_one_length_a_filter() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 0.5, -1e-30])
    assert sign_of_activations(x).tolist() == [-1, 0, 0, 1, 1, -1]
    weight = random(4, 3, 3, 3)
    weight[1, 0, 0, 0] = 0
    used = binarised(weight)
    for one, filter_ in zip(used, weight, strict=True):
        assert set(one.unique().tolist()) <= {-float(filter_.abs().mean()), 0.0, float(filter_.abs().mean())}
        assert torch.equal(one.sign(), filter_.sign())
    assert int((used == 0).sum()) == 1
    layer = convolution()
    seen = seen_by(layer, torch.zeros(27, 3, 3, 3))
    torch.testing.assert_close(seen, binarised(layer.weight.detach()), rtol=1e-12, atol=0)  # float64


# slopes that were worked out by hand, at both sides of each kink
SLOPES = {-1.5: 0.0, -1.0: 0.0, -0.75: 0.5, -0.5: 1.0, -0.25: 1.5, 0.0: 2.0, 0.25: 1.5, 0.5: 1.0, 0.75: 0.5, 1.0: 0.0}


def quadratic(x: Tensor) -> Tensor:
    """The curve whose slope stands for that of the sign."""
    inside = torch.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    return torch.where(x.abs() < 1, inside, x.sign())


def test_s2_gradient_of_activations_is_the_slope_of_the_quadratic() -> None:
    x = torch.tensor(list(SLOPES), dtype=torch.float64)
    assert gradient_of(sign_of_activations, x, torch.ones_like(x)).tolist() == list(SLOPES.values())
    x, upstream = 0.8 * random(200), random(200, seed=1)
    slope = (quadratic(x + 1e-6) - quadratic(x - 1e-6)) / 2e-6
    gradient = gradient_of(sign_of_activations, x.clone(), upstream)
    torch.testing.assert_close(gradient, upstream * slope, rtol=0, atol=1e-5)  # finite differences across a kink


def test_s3_gradient_of_weights_is_that_of_the_used_ones_where_they_are_at_most_1_long() -> None:
    weight = torch.tensor([0.2, -1.0, 1.0, 1.0 + 1e-9, -1.5, 0.0], dtype=torch.float64).view(2, 3, 1, 1)
    upstream = random(2, 3, 1, 1)
    passes = torch.tensor([1.0, 1, 1, 0, 0, 1]).view(2, 3, 1, 1)
    assert torch.equal(gradient_of(binarised, weight, upstream), upstream * passes)
    layer, x = convolution(scale=0.8), random(2, 3, 5, 5, seed=2)
    F.conv2d(x, used := binarised(layer.weight.detach()).requires_grad_(), padding=1).square().sum().backward()
    layer(x).square().sum().backward()
    assert used.grad is not None and layer.weight.grad is not None
    assert (layer.weight.detach().abs() > 1).any()
    torch.testing.assert_close(layer.weight.grad, used.grad * (layer.weight.detach().abs() <= 1), rtol=1e-12, atol=0)


def test_s3_twice_the_weights_give_twice_the_output() -> None:
    layer, x = convolution(scale=0.1), random(2, 3, 5, 5)
    once = layer(x).detach()
    layer.weight.data.mul_(2)
    torch.testing.assert_close(layer(x), 2 * once, rtol=1e-12, atol=1e-15)


def test_filter_worked_out_by_hand() -> None:
    weight = torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64).view(1, 3, 1, 1)
    used = binarised(weight)
    torch.testing.assert_close(used.flatten(), torch.tensor([0.4, -0.4, 0.4], dtype=torch.float64), rtol=1e-15, atol=0)
    assert gradient_of(binarised, weight, torch.ones_like(weight)).flatten().tolist() == [1, 1, 1]


def test_s4_switch_changes_the_weights_in_use_and_no_name_or_shape() -> None:
    network, x = TinyBinary().double().eval(), random(2, 3, 28, 28)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    binary = network(x)
    binarise_weights(network, False)
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes
    assert not torch.allclose(network(x), binary)
    layer = convolution()
    binarise_weights(layer, False)
    y = random(2, 3, 5, 5)
    assert torch.equal(layer(y), F.conv2d(y, layer.weight, padding=1))
    gradient = gradient_of(lambda weight: torch.where(layer.binary, binarised(weight), weight), 3 * y, y)
    assert torch.equal(gradient, y)  # real weights are not clipped


def test_switch_is_part_of_the_state() -> None:
    network, other = TinyBinary(), TinyBinary()
    binarise_weights(network, False)
    other.load_state_dict(network.state_dict())
    assert not any(bool(layer.binary) for _, layer in binary_convolutions(other))


def test_latent_weights_start_with_both_signs_or_all_positive() -> None:
    torch.manual_seed(0)
    network = TinyBinary()
    for _, layer in binary_convolutions(network):
        assert 0.4 < float((layer.weight > 0).float().mean()) < 0.6
        assert 0.9e-3 < float(layer.weight.detach().abs().max()) <= 1e-3
    before = {name: layer.weight.detach().abs() for name, layer in binary_convolutions(network)}
    make_weights_positive(network)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in binary_convolutions(network))


def test_rsign_takes_signs_around_a_threshold_of_each_channel() -> None:
    layer, x = RSign(2), torch.tensor([-0.5, 0.2]).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    assert layer(x).flatten().tolist() == [-1, 1, -1, 1]
    layer.shift.data.copy_(torch.tensor([1.0, -1.0]))
    assert layer(x).flatten().tolist() == [1, 1, -1, -1]
    layer(x).sum().backward()
    assert layer.shift.grad is not None
    torch.testing.assert_close(layer.shift.grad, torch.tensor([1.0, 0.4]))  # 2 - 2|x| at .5, 1.2, -1.5 and -.8


def test_rprelu_is_a_prelu_with_a_moved_kink() -> None:
    layer, x = RPReLU(2).double(), random(2, 2, 3, 3)
    assert torch.equal(layer(x), torch.where(x > 0, x, 0.25 * x))
    for parameter, value in zip(layer.parameters(), ([0.3, -0.1], [0.1, 0.5], [1.0, 2.0]), strict=True):
        parameter.data.copy_(torch.tensor(value, dtype=torch.float64))
    second = x[:, 1] - 0.1
    expected = torch.where(second > 0, second, 0.5 * second) + 2
    torch.testing.assert_close(layer(x)[:, 1], expected, rtol=1e-12, atol=1e-15)


def test_half_precision_leaves_signs_lengths_and_gradients_in_fp32() -> None:
    layer, sign = convolution().float(), RSign(3)
    x = random(2, 3, 5, 5).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signs = sign(x)
        output = layer(signs)
    assert (signs.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    output.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert sign.shift.grad is not None and sign.shift.grad.dtype == torch.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_a_convolution_of_the_used_weights(stride: int) -> None:
    layer, x = convolution(stride=stride), random(2, 3, 7, 7)
    expected = F.conv2d(x, binarised(layer.weight), stride=stride, padding=1)
    assert torch.equal(layer(x), expected)


def test_binary_networks_are_told_from_others_and_have_blocks_to_recompute() -> None:
    assert is_binary(TinyBinary())
    assert not is_binary(nn.Conv2d(1, 1, 1))
    network = TinyBinary()
    assert residual_blocks(network) == list(network.blocks)
