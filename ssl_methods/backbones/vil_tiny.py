"""Vision Longformer, the size of Swin-T: attention to a window, its neighbours and one token that all see."""

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.backbone import Encoded, TokenBackbone
from ssl_methods.local_attention import RelativeBias, Shared, local_attention
from ssl_methods.transformer import TransformerBlock, initialise, rising_drops

PATCHES, WIDTHS, NUM_HEADS, DEPTHS = (4, 2, 2, 2), (96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 6, 2)
NUM_GLOBAL = (1, 1, 1, 0)  # tokens of each stage that all see and that see all
NUM_LOCAL_STAGES = 2  # the stages behind them attend to the whole grid
DROP = 0.1  # stochastic depth of the last block


class ViLTiny(TokenBackbone):
    """Four stages behind patches of 4, 2, 2 and 2 tokens: 49 tokens of width 768 on 224 px images, 9 on 96 px ones.

    28 M parameters. A token of the first two stages attends to its window, the eight windows around it, and the
    stage's global token; in the last two to the whole grid. The global tokens end with their stage. The last has
    none, so that features are the mean over its tokens. Sides that a patch does not divide are padded with zeros.

    Args:
        window: side of the windows, tokens.

    Differs from the authors' code:
        - Always all eight neighbours, never one drawn at random (their `MODE 1`, a faster training).
        - Distances longer than two windows share their biases, so that any image size works.

    Source: Zhang et al. 2021, arXiv:2103.15358, with relative positions; the 2-2-6-2 network of EsViT (Li et al. 2022,
        arXiv:2106.09785).
    """

    def __init__(self, *, window: Annotated[int, Ge(1)] = 7) -> None:
        super().__init__()
        self.embed_dim = WIDTHS[-1]
        drops = rising_drops(DROP, DEPTHS)
        self.stages = nn.ModuleList(
            _Stage(
                input_dim,
                width,
                patch=PATCHES[index],
                num_global=NUM_GLOBAL[index],
                blocks=[
                    TransformerBlock(
                        width,
                        _Attention(width, NUM_HEADS[index], NUM_GLOBAL[index], window, index < NUM_LOCAL_STAGES),
                        hidden_dim=4 * width,
                        drop=drop,
                    )
                    for drop in drops[index]
                ],
            )
            for index, (input_dim, width) in enumerate(pairwise((3, *WIDTHS)))
        )
        self.norm = nn.LayerNorm(WIDTHS[-1], eps=1e-6)
        initialise(self)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the mean over the tokens of the last layer norm, and the tokens."""
        grid = images
        for stage in self.stages:
            grid = stage(grid)
        tokens = self.norm(grid.flatten(2).transpose(1, 2))
        return Encoded(tokens.mean(dim=1), tokens)


class _Stage(nn.Module):
    def __init__(
        self, input_dim: int, dim: int, *, patch: int, num_global: int, blocks: list[TransformerBlock]
    ) -> None:
        super().__init__()
        self.patch, self.num_global = patch, num_global
        self.patches = nn.Conv2d(input_dim, dim, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(dim, eps=1e-6)
        if num_global:
            self.global_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_global, dim), std=0.02))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, grid: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, "batch dim height width"]:
        below, right = (-side % self.patch for side in grid.shape[2:])
        if below or right:
            grid = F.pad(grid, (0, right, 0, below))
        patches = self.patches(grid)
        height, width = patches.shape[2:]
        tokens = self.patch_norm(patches.flatten(2).transpose(1, 2))
        if self.num_global:
            tokens = torch.cat([self.global_tokens.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, height, width)
        grid_again: Tensor = tokens[:, self.num_global :].transpose(1, 2).unflatten(2, (height, width))
        return grid_again


class _Attention(nn.Module):
    """Attention of the global tokens, which come first, to all, and of the others to the global ones and to near ones.

    Args:
        dim, num_heads: of the tokens.
        num_global: how many are global.
        window: side of the windows.
        local: whether only the window and its neighbours are near, not the whole grid.
    """

    def __init__(self, dim: int, num_heads: int, num_global: int, window: int, local: bool) -> None:
        super().__init__()
        self.num_heads, self.num_global = num_heads, num_global
        self.window = window if local else 0
        self.inputs = nn.Linear(dim, 3 * dim)
        self.bias = RelativeBias(num_heads, 2 * window - 1)
        if num_global:
            # of each head, for products of any query with the key of a global token
            self.global_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads), std=0.02))
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], height: int, width: int) -> Tensor:
        query, key, value = self.inputs(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query_grid, key_grid, value_grid = (
            each[:, self.num_global :].unflatten(1, (height, width)) for each in (query, key, value)
        )
        shared = None
        if self.num_global:
            shared = Shared(key[:, : self.num_global], value[:, : self.num_global], self.global_bias)
        near = local_attention(
            query_grid,
            key_grid,
            value_grid,
            window=self.window or max(height, width),
            halo=self.window,
            bias=self.bias,
            shared=shared,
        ).flatten(1, 2)
        attended = near if shared is None else torch.cat([self._see_all(query, key, value), near], dim=1)
        mixed: Tensor = self.output(attended.flatten(2))
        return mixed

    def _see_all(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "batch globals heads dim"]:
        bias = torch.zeros(self.num_heads, 1, key.shape[1], dtype=query.dtype, device=query.device)
        bias[:, :, : self.num_global] = self.global_bias[:, None, None]
        query, key, value = (each.transpose(1, 2) for each in (query[:, : self.num_global], key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
