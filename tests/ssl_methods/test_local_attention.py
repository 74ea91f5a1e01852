from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from ssl_methods.local_attention import RelativeBias, Shared, local_attention

HEADS, DIM = 2, 3
# height, width, window, shift, halo
CASES = [
    (6, 6, 3, 0, 0),  # whole windows
    (5, 7, 3, 0, 0),  # cut by the border
    (6, 6, 3, 1, 0),  # shifted
    (7, 5, 4, 2, 0),
    (4, 9, 4, 2, 0),  # one axis is a window
    (2, 3, 4, 2, 0),  # smaller than a window
    (6, 9, 3, 0, 3),  # windows and neighbours
    (7, 8, 3, 0, 3),
    (3, 8, 3, 0, 3),
    (7, 7, 3, 1, 2),
]


def grids(height: int, width: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, height, width, HEADS, DIM, generator=generator, dtype=torch.float64).unbind()


def seen_along(length: int, window: int, shift: int, halo: int) -> Tensor:
    """Which place of an axis sees which, worked out place by place."""
    if window >= length:
        return torch.ones(length, length, dtype=torch.bool)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for place in range(length):
        first = (place - shift) // window * window + shift
        seen[place, max(0, first - halo) : first + window + halo] = True
    return seen


def seen_by(height: int, width: int, window: int, shift: int, halo: int) -> Tensor:
    rows, columns = (seen_along(length, window, shift, halo) for length in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def distances_along(length: int, reach: int) -> Tensor:
    places = torch.arange(length)
    return (places[None] - places[:, None]).clamp(-reach, reach) + reach


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    height, width = query.shape[1:3]
    flat = (each.flatten(1, 2).transpose(1, 2) for each in (query, key, value))
    attended = F.scaled_dot_product_attention(*flat, attn_mask=mask)
    return attended.transpose(1, 2).unflatten(1, (height, width))


def bias_of(reach: int) -> RelativeBias:
    torch.manual_seed(0)
    bias = RelativeBias(HEADS, reach).double()
    torch.nn.init.normal_(bias.table)
    return bias


@pytest.mark.parametrize(("height", "width", "window", "shift", "halo"), CASES)
def test_equals_attention_to_all_under_a_mask(height: int, width: int, window: int, shift: int, halo: int) -> None:
    query, key, value = grids(height, width)
    bias = bias_of(window - 1 + halo)
    seen = seen_by(height, width, window, shift, halo)
    down, across = (distances_along(length, bias.reach) for length in (height, width))
    index = (down[:, None, :, None] * (2 * bias.reach + 1) + across[None, :, None, :]).flatten(2).flatten(0, 1)
    plain = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    sizes: dict[str, Any] = {"window": window, "shift": shift, "halo": halo}
    for biases, mask in ((None, plain), (bias, plain + bias.table[index].permute(2, 0, 1))):
        got = local_attention(query, key, value, bias=biases, **sizes)
        torch.testing.assert_close(got, dense(query, key, value, mask), rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.parametrize(("height", "width", "window", "shift", "halo"), CASES)
def test_no_token_attends_beyond_its_window(height: int, width: int, window: int, shift: int, halo: int) -> None:
    query, key, value = grids(height, width)
    sizes: dict[str, Any] = {"window": window, "shift": shift, "halo": halo}
    before = local_attention(query, key, value, **sizes).flatten(1, 2)
    seen = seen_by(height, width, window, shift, halo)
    for place in range(height * width):
        row, column = divmod(place, width)
        others = [each.clone() for each in (key, value)]
        for each in others:
            each[0, row, column] += 1.0
        after = local_attention(query, *others, **sizes).flatten(1, 2)
        moved = (after != before).any(dim=-1).any(dim=-1)
        assert torch.equal(moved[0], seen[:, place])
        assert not bool(moved[1].any())  # another image


def test_shared_tokens_are_seen_by_all_with_a_bias_of_their_own() -> None:
    query, key, value = grids(5, 6)
    extra_key, extra_value = (each[:, 0] for each in grids(1, 2)[:2])
    offset = torch.tensor([0.3, -2.0], dtype=torch.float64)
    for window, halo in ((3, 0), (3, 3), (6, 0)):
        got = local_attention(
            query, key, value, window=window, halo=halo, shared=Shared(extra_key, extra_value, offset)
        )
        seen = seen_by(5, 6, window, 0, halo)
        plain = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf).expand(HEADS, -1, -1)
        mask = torch.cat([offset[:, None, None].expand(-1, 30, 2), plain], dim=2)
        keys, values = (
            torch.cat([some, every.flatten(1, 2)], dim=1).transpose(1, 2)
            for some, every in ((extra_key, key), (extra_value, value))
        )
        flat = F.scaled_dot_product_attention(query.flatten(1, 2).transpose(1, 2), keys, values, attn_mask=mask)
        expected = flat.transpose(1, 2).unflatten(1, (5, 6))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64


def test_distances_beyond_the_reach_share_a_bias() -> None:
    bias = bias_of(2)
    found = bias((6, 0), (1, 0))
    assert found.shape == (HEADS, 6, 6)
    assert torch.equal(found[:, 0, 2], found[:, 0, 5])
    assert torch.equal(found[:, 3, 4], found[:, 0, 1])
    assert not torch.equal(found[:, 0, 1], found[:, 1, 0])


def test_gradient_equals_finite_differences() -> None:
    inputs = [each[:1, :4, :3, :1, :2].clone().requires_grad_() for each in grids(4, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: local_attention(q, k, v, window=2, shift=1, halo=1), inputs)


def test_half_precision_stays_half() -> None:
    query, key, value = (each.bfloat16() for each in grids(5, 6))
    found = local_attention(query, key, value, window=3, shift=1, bias=bias_of(2).float())
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
