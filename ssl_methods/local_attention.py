"""Attention of the tokens of a grid to those around them: in windows, shifted windows, windows and their neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float, Int
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """A learnt number for each head and each distance of two tokens in rows and columns.

    Args:
        num_heads: number of heads.
        reach: the longest distance, in tokens, with a number of its own; longer ones share its number.

    Source: Liu et al. 2021, arXiv:2103.14030, eq. 4.
    """

    def __init__(self, num_heads: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros((2 * reach + 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, rows: tuple[int, int], columns: tuple[int, int]) -> Float[Tensor, "heads queries keys"]:
        """Return what is added to the products of the queries of one window with all keys that they see.

        Args:
            rows, columns: how long the window is, and how far it sees beyond either end.
        """
        down, across = self._distances(*rows), self._distances(*columns)
        index = down[:, None, :, None] * (2 * self.reach + 1) + across[None, :, None, :]
        return self.table[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)

    def _distances(self, length: int, halo: int) -> Int[Tensor, "queries keys"]:
        places = torch.arange(-halo, length + halo, device=self.table.device)
        distances = places[None] - places[halo : halo + length, None]
        return distances.clamp(-self.reach, self.reach) + self.reach


class Shared(NamedTuple):
    """Tokens that every window sees.

    Attributes:
        key, value: theirs.
        bias: added to a head's products with these keys.
    """

    key: Float[Tensor, "batch shared heads dim"]
    value: Float[Tensor, "batch shared heads dim"]
    bias: Float[Tensor, " heads"]


def local_attention(
    query: Float[Tensor, "batch height width heads dim"],
    key: Float[Tensor, "batch height width heads dim"],
    value: Float[Tensor, "batch height width heads dim"],
    *,
    window: int,
    shift: int = 0,
    halo: int = 0,
    bias: RelativeBias | None = None,
    shared: Shared | None = None,
) -> Float[Tensor, "batch height width heads dim"]:
    """Let each token of a grid attend to the tokens of its window, and to those a few rows and columns around it.

    Nothing beyond the border of the grid is attended to. A window that is longer than the grid shrinks to it, and is
    not shifted.

    Args:
        query, key, value: of every token.
        window: side of the square windows.
        shift: row and column where the second window begins; 0 for whole windows from the first.
        halo: rows and columns around a window that its tokens see too.
        bias: of distances.
        shared: tokens that all see.

    Source: Liu et al. 2021, arXiv:2103.14030, section 3.2 (windows, shifted windows); Zhang et al. 2021,
        arXiv:2103.15358, section 3.2 (windows and their neighbours, tokens that all see).
    """
    heads = query.shape[3]
    rows, columns = (_plan(length, window, shift, halo) for length in query.shape[1:3])
    queries = _windows(query, rows, columns)
    keys, values = (_surroundings(each, rows, columns) for each in (key, value))
    mask = _mask(rows, columns, bias, query)
    if shared is not None:
        keys, values = (_append(some, every) for some, every in ((shared.key, keys), (shared.value, values)))
        mask = _append_bias(shared, mask, queries, keys)
    # windows count as heads, so that one mask serves the whole batch without a copy for each image
    if mask is not None:
        mask = mask.to(query.dtype).expand(queries.shape[1], heads, -1, -1).flatten(0, 1)
    queries, keys, values = (each.flatten(1, 2) for each in (queries, keys, values))
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return _joined(torch.unflatten(attended, 1, (-1, heads)), rows, columns)


class _Axis(NamedTuple):
    """How an axis of a grid is cut into windows.

    Attributes:
        length: of the axis.
        window: length of each window.
        before: how many of the first window's tokens lie before the axis.
        num_windows: how many there are.
        halo: how far a window sees beyond either end.
    """

    length: int
    window: int
    before: int
    num_windows: int
    halo: int

    @property
    def margins(self) -> tuple[int, int]:
        """How far windows and what they see reach beyond the axis, before and behind it."""
        behind = self.num_windows * self.window - self.before - self.length
        return self.before + self.halo, behind + self.halo


def _plan(length: int, window: int, shift: int, halo: int) -> _Axis:
    if window >= length:
        return _Axis(length, length, 0, 1, 0)
    before = (window - shift) % window
    return _Axis(length, window, before, -(-(length + before) // window), halo)


def _windows(x: Tensor, rows: _Axis, columns: _Axis) -> Float[Tensor, "batch windows heads tokens dim"]:
    rows, columns = rows._replace(halo=0), columns._replace(halo=0)
    cut = torch.unflatten(_padded(x, rows, columns), 2, (columns.num_windows, -1))
    cut = torch.unflatten(cut, 1, (rows.num_windows, -1))
    # (batch, rows of windows, rows, columns of windows, columns, heads, dim)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _joined(windows: Tensor, rows: _Axis, columns: _Axis) -> Float[Tensor, "batch height width heads dim"]:
    """Undo `_windows`."""
    cut = torch.unflatten(windows, 3, (rows.window, columns.window))
    cut = torch.unflatten(cut, 1, (rows.num_windows, columns.num_windows))
    grid = cut.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return grid[:, rows.before : rows.before + rows.length, columns.before : columns.before + columns.length]


def _surroundings(x: Tensor, rows: _Axis, columns: _Axis) -> Float[Tensor, "batch windows heads tokens dim"]:
    if rows.halo == columns.halo == 0:
        return _windows(x, rows, columns)
    seen = _padded(x, rows, columns)
    for dim, axis in ((1, rows), (2, columns)):
        seen = seen.unfold(dim, axis.window + 2 * axis.halo, axis.window)
    # (batch, rows of windows, columns of windows, heads, dim, rows, columns)
    return seen.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(1, 2)


def _padded(x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    margins = (*columns.margins, *rows.margins)
    return F.pad(x, [0, 0, 0, 0, *margins]) if any(margins) else x


def _mask(
    rows: _Axis, columns: _Axis, bias: RelativeBias | None, like: Tensor
) -> Float[Tensor, "windows heads queries keys"] | None:
    """Return what is added to the products: the bias, and minus infinity beyond the border; axes of equals have 1."""
    biases = None if bias is None else bias((rows.window, rows.halo), (columns.window, columns.halo))[None]
    if not any((*rows.margins, *columns.margins)):
        return biases
    inside = _surroundings(like.new_ones(1, rows.length, columns.length, 1, 1), rows, columns)
    border = torch.zeros_like(inside).masked_fill(inside == 0, -torch.inf)[0, :, :, None, :, 0]
    return border if biases is None else border + biases


def _append(shared: Tensor, windows: Tensor) -> Float[Tensor, "batch windows heads tokens dim"]:
    """Put the tokens that all see before those of each window."""
    every = shared.transpose(1, 2)[:, None].expand(-1, windows.shape[1], -1, -1, -1)
    return torch.cat([every, windows], dim=3)


def _append_bias(
    shared: Shared, mask: Tensor | None, queries: Tensor, keys: Tensor
) -> Float[Tensor, "windows heads queries keys"]:
    num_shared = shared.key.shape[1]
    _, windows, heads, num_queries, _ = queries.shape
    if mask is None:
        mask = queries.new_zeros(1, 1, 1, keys.shape[3] - num_shared)
    first = shared.bias.to(mask.dtype).view(1, heads, 1, 1).expand(windows, heads, num_queries, num_shared)
    return torch.cat([first, mask.expand(windows, heads, num_queries, -1)], dim=3)
