"""Residual networks for 28 to 32 px images on CPUs, of any width."""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Encoded, TokenBackbone


class SmallResNet(TokenBackbone):
    """Three stages of one basic block each behind a stride-2 stem: 14, 7 and 4 px wide on 28 px images.

    Narrow early stages and channels-last memory make it fast on one CPU thread. The last batch norm of each block
    starts at zero, so that blocks start as the identity (Goyal et al. 2017, arXiv:1706.02677).

    Args:
        widths: channels of the stages; the last is the width of the features.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.embed_dim = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.Sequential(
            _Block(widths[0], widths[0], stride=1),
            _Block(widths[0], widths[1], stride=2),
            _Block(widths[1], widths[2], stride=2),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the mean over positions of the last stage, and the positions."""
        features: Tensor = self.stages(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return Encoded(features.mean(dim=(2, 3)), features.flatten(2).transpose(1, 2))


class _Block(nn.Module):
    def __init__(self, input_dim: int, output_dim: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_dim, output_dim, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(output_dim)
        self.conv2 = nn.Conv2d(output_dim, output_dim, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(output_dim)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or input_dim != output_dim:
            self.shortcut = nn.Sequential(
                nn.Conv2d(input_dim, output_dim, 1, stride=stride, bias=False), nn.BatchNorm2d(output_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))
