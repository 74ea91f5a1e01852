"""A vision transformer for 12 to 32 px images on CPUs; no layer couples the images of a batch."""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Encoded, TokenBackbone

PATCH, WIDTH, NUM_HEADS, NUM_BLOCKS = 4, 96, 3, 3
_SLOWEST = 100.0  # wavelength over 2 pi of the coarsest position feature, patches; grids here are 8 wide at most


class TinyViT(TokenBackbone):
    """Three blocks on patches of 4 x 4 px: 49 tokens of width 96 on 28 px images, averaged behind a last layer norm.

    0.23 M parameters. Positions are fixed sines and cosines of a patch's place in units of patches, so that any size
    from 4 px up works; pixels beyond the last whole patch are left out.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929; positions and mean over tokens as in MoCo v3, arXiv:2104.02057.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*[_Block() for _ in range(NUM_BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the mean over tokens of the last layer norm, and the tokens."""
        grid = self.patches(images)
        tokens = grid.flatten(2).transpose(1, 2)
        positions = _positions(grid.shape[2], grid.shape[3], device=images.device).to(tokens.dtype)
        encoded: Tensor = self.norm(self.blocks(tokens + positions))
        return Encoded(encoded.mean(dim=1), encoded)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = _Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        # (batch, tokens, 3 width) -> query, key and value of (batch, heads, tokens, width / heads) each
        split = self.inputs(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*split.unbind(0))
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed


def _positions(height: int, width: int, *, device: torch.device) -> Float[Tensor, "tokens dim"]:
    """Return sines and cosines of each patch's row and column, a quarter of the width each."""
    quarter = WIDTH // 4
    frequencies = _SLOWEST ** (-torch.arange(quarter, device=device) / quarter)
    rows, columns = (torch.outer(torch.arange(side, device=device), frequencies) for side in (height, width))
    angles = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2).flatten(0, 1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
