"""The block of binary residual networks of the MobileNet kind."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.binary import BinaryConv2d, RPReLU, RSign


class ReActBlock(nn.Module):
    """A binary 3x3 convolution and a binary 1x1 one, each with a shortcut past it that stays real.

    Twice as many channels come from two 1x1 convolutions side by side, as a shortcut must not change their number.

    Args:
        input_dim, output_dim: channels, equal or doubled.
        stride: of the 3x3 convolution, 1 or 2. Sides are halved and rounded up, those of the shortcut too.

    Source: Liu et al. 2020, arXiv:2003.03488; the authors' doubling blocks own a third 1x1 convolution that
        nothing uses.
    """

    def __init__(self, input_dim: int, output_dim: int, *, stride: int = 1) -> None:
        super().__init__()
        if output_dim not in (input_dim, 2 * input_dim):
            raise ValueError(f"output_dim: {output_dim} of {input_dim} channels; keep or double them")
        self.sign1 = RSign(input_dim)
        self.conv = BinaryConv2d(input_dim, input_dim, 3, stride=stride)
        self.norm = nn.BatchNorm2d(input_dim)
        # Rounds up as the convolution does. What lies outside is never averaged; where nothing is padded the last
        # argument says no more, but without it torch.compile makes wrong gradients (PyTorch issue 198119).
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.shortcut = pool if stride > 1 else nn.Identity()
        self.activation1 = RPReLU(input_dim)
        self.sign2 = RSign(input_dim)
        self.branches = nn.ModuleList(
            nn.Sequential(BinaryConv2d(input_dim, input_dim, 1), nn.BatchNorm2d(input_dim))
            for _ in range(output_dim // input_dim)
        )
        self.activation2 = RPReLU(output_dim)

    def forward(
        self, x: Float[Tensor, "batch input_dim height width"]
    ) -> Float[Tensor, "batch output_dim new_height new_width"]:
        """Mix space, then channels."""
        x = self.activation1(self.norm(self.conv(self.sign1(x))) + self.shortcut(x))
        signs = self.sign2(x)
        mixed: Tensor = self.activation2(torch.cat([branch(signs) + x for branch in self.branches], dim=1))
        return mixed
