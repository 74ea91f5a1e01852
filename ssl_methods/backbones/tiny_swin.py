"""A Swin transformer for 8 to 32 px images on CPUs; no layer couples the images of a batch."""

from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Encoded, TokenBackbone
from ssl_methods.local_attention import RelativeBias, local_attention
from ssl_methods.transformer import TransformerBlock, initialise

PATCH, WIDTHS, NUM_HEADS, DEPTH = 2, (48, 96), (3, 6), 2


class TinySwin(TokenBackbone):
    """Two stages of two blocks, the second of each in shifted windows: 14 x 14, then 7 x 7 tokens on 28 px images.

    0.21 M parameters. Features are the mean over the last stage's tokens, of width 96. Sides that a patch or a merge
    does not divide are padded with zeros.

    Args:
        window: side of the windows, tokens.

    Source: Liu et al. 2021, arXiv:2103.14030; much smaller.
    """

    def __init__(self, *, window: Annotated[int, Ge(1)] = 7) -> None:
        super().__init__()
        self.embed_dim = WIDTHS[-1]
        self.patches = nn.Conv2d(3, WIDTHS[0], PATCH, stride=PATCH)
        self.patch_norm = nn.LayerNorm(WIDTHS[0], eps=1e-6)
        self.merge_norm = nn.LayerNorm(4 * WIDTHS[0], eps=1e-6)
        self.merge = nn.Linear(4 * WIDTHS[0], WIDTHS[1], bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    TransformerBlock(
                        width,
                        _Attention(width, heads, window=window, shift=shift),
                        hidden_dim=2 * width,
                    )
                    for shift in (0, window // 2)
                ]
            )
            for width, heads in zip(WIDTHS, NUM_HEADS, strict=True)
        )
        self.norm = nn.LayerNorm(WIDTHS[-1], eps=1e-6)
        initialise(self)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the mean over the tokens of the last layer norm, and the tokens."""
        grid = self.patches(_even(images, dims=(2, 3))).permute(0, 2, 3, 1)
        grid = _even(self.stages[0](self.patch_norm(grid)), dims=(1, 2))
        merged = torch.unflatten(torch.unflatten(grid, 2, (-1, 2)), 1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        tokens = self.norm(self.stages[1](self.merge(self.merge_norm(merged)))).flatten(1, 2)
        return Encoded(tokens.mean(dim=1), tokens)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.inputs = nn.Linear(dim, 3 * dim)
        self.bias = RelativeBias(num_heads, window - 1)
        self.output = nn.Linear(dim, dim)

    def forward(self, grid: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        query, key, value = self.inputs(grid).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        attended = local_attention(query, key, value, window=self.window, shift=self.shift, bias=self.bias)
        mixed: Tensor = self.output(attended.flatten(3))
        return mixed


def _even(x: Tensor, *, dims: tuple[int, int]) -> Tensor:
    """Add a row and a column of zeros behind those sides that are odd."""
    height, width = (x.shape[dim] % 2 for dim in dims)
    behind = [0] * (2 * (x.ndim - 1 - dims[1]))
    return F.pad(x, [*behind, 0, width, 0, height]) if height or width else x
