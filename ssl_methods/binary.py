"""Layers of one bit: signs of activations and of weights, and the gradients that pass them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

LATENT_SCALE = 1e-3  # of the weights whose signs are used, at the start (Liu et al. 2020, the authors' code)


def sign_of_activations(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return -1, 0 or +1; only a zero gives 0.

    Backward it is the piecewise quadratic whose slope is 2 - 2|x| within (-1, 1) and 0 outside.

    Source: Liu et al. 2018, arXiv:1808.00278 (Bi-Real net).
    """
    signs: Tensor = _SignOfActivations.apply(x)
    return signs


def binarised(weight: Float[Tensor, "outputs inputs height width"]) -> Float[Tensor, "outputs inputs height width"]:
    """Return the signs of weights, each filter's times the mean length of its weights; only a zero gives 0.

    Backward it is the identity for |weight| <= 1 and nothing beyond: no gradient flows through the mean, nor is it a
    factor of the gradient.

    Source: Liu et al. 2020, arXiv:2003.03488; Rastegari et al. 2016, arXiv:1603.05279.
    """
    signs: Tensor = _SignOfWeights.apply(weight)
    return signs


def mean_length(weight: Float[Tensor, "outputs inputs height width"]) -> Float[Tensor, " outputs"]:
    """Return the mean of |weight| of each filter (alpha)."""
    return weight.abs().mean(dim=(1, 2, 3))


class RSign(nn.Module):
    """Signs of activations around a threshold that each channel learns.

    Source: Liu et al. 2020, arXiv:2003.03488.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the signs of the shifted activations, in fp32 at least as the shift is."""
        return sign_of_activations(x + self.shift[:, None, None])


class RPReLU(nn.Module):
    """PReLU whose kink each channel moves to where it wants it.

    Source: Liu et al. 2020, arXiv:2003.03488; slopes start at 0.25 as in the authors' code.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(num_channels))
        self.slope = nn.Parameter(torch.full((num_channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the activations, in fp32 at least as the shifts are."""
        x = x + self.shift_in[:, None, None]
        # F.prelu, but for autocast, which would run that in half precision on GPUs
        return torch.where(x > 0, x, self.slope[:, None, None] * x) + self.shift_out[:, None, None]


class BinaryConv2d(nn.Conv2d):
    """A convolution without bias that uses the signs of its weights, or the weights themselves.

    Which of them is the buffer `binary`, so that a checkpoint says it too; names and shapes are the same either way.
    The weights whose signs are used ("latent") are real and start uniformly between -0.001 and 0.001.

    Args:
        input_dim, output_dim: channels.
        size: side of the filters; odd. The input is padded with zeros, so that stride 1 keeps its size.
        stride: of both axes.
    """

    binary: Tensor

    def __init__(self, input_dim: int, output_dim: int, size: int, *, stride: int = 1) -> None:
        super().__init__(input_dim, output_dim, size, stride=stride, padding=size // 2, bias=False)
        self.register_buffer("binary", torch.ones((), dtype=torch.bool))

    def reset_parameters(self) -> None:
        """Draw the latent weights."""
        nn.init.uniform_(self.weight, -LATENT_SCALE, LATENT_SCALE)

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _ _ _"]:
        """Convolve."""
        # a choice on the device: reading the switch would make the CPU wait for the GPU in every layer
        weight = torch.where(self.binary, binarised(self.weight), self.weight)
        return F.conv2d(input, weight, stride=self.stride, padding=self.padding)


def binary_convolutions(module: nn.Module) -> Iterator[tuple[str, BinaryConv2d]]:
    """List the binary convolutions inside a module, with their names."""
    return ((name, each) for name, each in module.named_modules() if isinstance(each, BinaryConv2d))


def is_binary(module: nn.Module) -> bool:
    """Tell whether a module has binary convolutions at all."""
    return next(binary_convolutions(module), None) is not None


def binarise_weights(module: nn.Module, on: bool) -> None:
    """Let all binary convolutions use the signs of their weights, or the weights themselves."""
    for _, convolution in binary_convolutions(module):
        convolution.binary.fill_(on)


@torch.no_grad()
def make_weights_positive(module: nn.Module) -> None:
    """Drop the signs of the latent weights, which leaves them uniform between 0 and 0.001.

    That is the start of the authors' code. As all signs are equal then, it is for trainings whose weights are real at
    first.
    """
    for _, convolution in binary_convolutions(module):
        convolution.weight.abs_()


class _SignOfActivations(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = grad * (2 - 2 * x.abs()).clamp_(min=0)
        return slope


class _SignOfWeights(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return mean_length(weight).view(-1, 1, 1, 1) * weight.sign()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        # written out, as releases of torch differ in what clamp's own gradient is at exactly 1
        passed: Tensor = grad * (weight.abs() <= 1)
        return passed
