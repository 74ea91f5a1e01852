"""A binary residual network for 28 to 32 px images on CPUs."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.react_block import ReActBlock

WIDTHS = (32, 64, 128, 128)


class TinyBinary(Backbone):
    """Three blocks of binary convolutions behind a real stem: 14, 7 and 4 px wide on 28 px images.

    0.22 M binary weights, 0.004 M real ones. Weights are binary at once; method s2_bnn can have them real at first.

    Source: the blocks of Liu et al. 2020, arXiv:2003.03488, with widths of our own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = WIDTHS[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        )
        self.blocks = nn.Sequential(
            ReActBlock(WIDTHS[0], WIDTHS[1]),
            ReActBlock(WIDTHS[1], WIDTHS[2], stride=2),
            ReActBlock(WIDTHS[2], WIDTHS[3], stride=2),
        )

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return the mean over positions of the last block."""
        features: Tensor = self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return features.mean(dim=(2, 3))
