"""Blocks of our transformers: two residual branches behind layer norms, dropped at random in training."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Drop a residual branch for some images of a batch, and scale it up for the others, in training.

    Args:
        p: share of the images.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Float[Tensor, "batch *tokens dim"]) -> Float[Tensor, "batch *tokens dim"]:
        """Return zeros for the images that drop it."""
        if not self.training or self.p == 0.0:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1.0 - self.p)
        return branch * (kept / (1.0 - self.p))


class TransformerBlock(nn.Module):
    """Attention, then a two-layer perceptron at each token, each behind a layer norm and beside a shortcut.

    Args:
        dim: width of the tokens.
        attention: maps normalised tokens to what is added to them.
        hidden_dim: of the perceptron.
        drop: share of the images that leave out a branch.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 2-3.
    """

    def __init__(self, dim: int, attention: nn.Module, *, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.drop = StochasticDepth(drop)

    def forward(self, x: Float[Tensor, "batch *tokens dim"], *where: int) -> Float[Tensor, "batch *tokens dim"]:
        """Return tokens of the same shape.

        Args:
            x: tokens.
            where: what else the attention asks for, as the sides of the grid.
        """
        x = x + self.drop(self.attention(self.norm1(x), *where))
        mixed: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return mixed


def initialise(network: nn.Module) -> None:
    """Give Linear layers truncated normal weights of std 0.02 and no bias, as vision transformers begin."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def rising_drops(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Return how much each block of each stage drops: from 0 at the first on a straight line to `last`."""
    shares = iter(torch.linspace(0.0, last, sum(depths), device="cpu").tolist())
    return [[next(shares) for _ in range(depth)] for depth in depths]
