"""CvT-T with attention in windows: a transformer whose tokens, queries, keys and values come from convolutions."""

from itertools import pairwise
from typing import Annotated

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Encoded, TokenBackbone
from ssl_methods.local_attention import local_attention
from ssl_methods.transformer import TransformerBlock, initialise, rising_drops

WIDTHS, NUM_HEADS, DEPTHS = (64, 192, 384, 768), (1, 3, 6, 12), (2, 2, 6, 2)
DROP = 0.1  # stochastic depth of the last block


class CvTTiny(TokenBackbone):
    """Four stages behind overlapping convolutions: 49 tokens of width 768 on 224 px images, 9 on 96 px ones.

    29 M parameters. Features are the mean over the tokens of the last stage. Positions are known from the
    convolutions alone.

    Args:
        window: side of the windows of attention, tokens, in all stages.

    Differs from the authors' code:
        - Windows at the border of a grid that they do not divide are smaller; there they hold zeros that are seen too.

    Source: Wu et al. 2021, arXiv:2103.15808, with windows and without a class token as in EsViT (Li et al. 2022,
        arXiv:2106.09785).
    """

    def __init__(self, *, window: Annotated[int, Ge(1)] = 7) -> None:
        super().__init__()
        self.embed_dim = WIDTHS[-1]
        self.embeddings = nn.ModuleList([nn.Conv2d(3, WIDTHS[0], 7, stride=4, padding=2)])
        self.embeddings.extend(nn.Conv2d(*widths, 3, stride=2, padding=1) for widths in pairwise(WIDTHS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    TransformerBlock(width, _Attention(width, heads, window), hidden_dim=4 * width, drop=drop)
                    for drop in drops
                ]
            )
            for width, heads, drops in zip(WIDTHS, NUM_HEADS, rising_drops(DROP, DEPTHS), strict=True)
        )
        self.norm = nn.LayerNorm(WIDTHS[-1])
        initialise(self)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the mean over the tokens of the last layer norm, and the tokens."""
        grid = images
        for embedding, norm, stage in zip(self.embeddings, self.norms, self.stages, strict=True):
            grid = stage(norm(embedding(grid).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        tokens = self.norm(grid.flatten(2).transpose(1, 2))
        return Encoded(tokens.mean(dim=1), tokens)


class _Attention(nn.Module):
    """Attention in windows to what a convolution of its own makes of the grid, for queries, keys and values each."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.inputs = nn.ModuleList(_ConvolutionalProjection(dim) for _ in range(3))
        self.output = nn.Linear(dim, dim)

    def forward(self, grid: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        query, key, value = (project(grid).unflatten(-1, (self.num_heads, -1)) for project in self.inputs)
        mixed: Tensor = self.output(local_attention(query, key, value, window=self.window).flatten(3))
        return mixed


class _ConvolutionalProjection(nn.Module):
    """A 3 x 3 convolution of each channel, batch norm, and a Linear layer (section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, grid: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        mixed = self.norm(self.convolution(grid.permute(0, 3, 1, 2)))
        projected: Tensor = self.linear(mixed.permute(0, 2, 3, 1))
        return projected
