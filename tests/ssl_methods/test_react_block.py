from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.react_block import ReActBlock


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("side", [8, 7, 1])
@pytest.mark.parametrize("output_dim", [6, 12])
def test_s7_stride_2_halves_the_sides_rounded_up_and_doubling_doubles_the_channels(side: int, output_dim: int) -> None:
    block = ReActBlock(6, output_dim, stride=2).double()
    assert block(random(2, 6, side, side)).shape == (2, output_dim, (side + 1) // 2, (side + 1) // 2)
    assert ReActBlock(6, output_dim).double()(random(2, 6, side, side)).shape == (2, output_dim, side, side)


def test_s7_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="output_dim: 18 of 6 channels; keep or double them"):
        ReActBlock(6, 18)


@pytest.mark.parametrize("output_dim", [4, 8])
def test_it_is_the_published_block(output_dim: int) -> None:
    block, x = ReActBlock(4, output_dim, stride=2).double(), random(3, 4, 6, 6)

    def signs_times_length(weight: Tensor) -> Tensor:
        return torch.stack([each.abs().mean() * each.sign() for each in weight])

    def normalised(y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, training=True)

    mixed = F.conv2d(x.sign(), signs_times_length(block.conv.weight), stride=2, padding=1)
    y = F.leaky_relu(normalised(mixed) + F.avg_pool2d(x, 2), 0.25)
    convolutions = [layer.weight for name, layer in block.branches.named_modules() if name.endswith(".0")]
    parts = [normalised(F.conv2d(y.sign(), signs_times_length(weight))) + y for weight in convolutions]
    expected = F.leaky_relu(torch.cat(parts, dim=1), 0.25)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-12)


def test_what_lies_outside_an_odd_side_is_not_averaged() -> None:
    shortcut = ReActBlock(1, 1, stride=2).shortcut
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    assert torch.equal(shortcut(x), torch.ones(1, 1, 2, 2))
    shortcut(x).sum().backward()
    assert x.grad is not None and x.grad[0, 0].tolist() == [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.5, 0.5, 1]]
    # torch.compile's gradient differs from this one if padding counts, though there is none (PyTorch issue 198119)
    assert not shortcut.count_include_pad


@pytest.mark.parametrize("output_dim", [4, 8])
def test_no_parameter_is_without_use(output_dim: int) -> None:
    block = ReActBlock(4, output_dim).double()
    block(random(3, 4, 6, 6)).square().sum().backward()
    assert [name for name, value in block.named_parameters() if value.grad is None] == []
