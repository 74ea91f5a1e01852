"""ReActNet-A: a binary residual network with the widths of MobileNet."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Backbone
from ssl_methods.react_block import ReActBlock

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class ReActNetA(Backbone):
    """Thirteen blocks of binary convolutions behind a real stem; 32 times smaller than 224 px images at the end.

    28.25 M binary weights. Blocks that double the channels halve the sides, but for the first. Weights are binary at
    once; method s2_bnn can have them real at first.

    Source: Liu et al. 2020, arXiv:2003.03488.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = WIDTHS[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        )
        self.blocks = nn.Sequential(
            *[
                ReActBlock(before, after, stride=2 if after > before and index > 0 else 1)
                for index, (before, after) in enumerate(pairwise(WIDTHS))
            ]
        )

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return the mean over positions of the last block."""
        features: Tensor = self.blocks(self.stem(images))
        return features.mean(dim=(2, 3))
