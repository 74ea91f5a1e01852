from __future__ import annotations

import torch

from ssl_methods.backbones.vil_tiny import ViLTiny


def test_both_crops_of_the_published_recipe_give_49_and_9_tokens_and_the_size_is_the_published_one() -> None:
    with torch.device("meta"):  # shapes without arithmetic
        backbone = ViLTiny()
        shapes = [backbone.encode(torch.empty(2, 3, side, side)).tokens.shape for side in (224, 96)]
    assert shapes == [(2, 49, 768), (2, 9, 768)]
    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6) == 28  # EsViT, table 4


def test_gradient_reaches_everything() -> None:
    torch.manual_seed(0)
    backbone = ViLTiny().eval()  # or blocks are dropped
    features, tokens = backbone.encode(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(tokens.mean(dim=1), features)
    features.square().sum().backward()
    idle = [name for name, value in backbone.named_parameters() if value.grad is None or not bool(value.grad.any())]
    assert not idle


def test_tokens_see_their_window_its_neighbours_and_the_global_token_which_sees_all() -> None:
    torch.manual_seed(0)
    attention = ViLTiny(window=2).stages[0].blocks[0].attention
    tokens = torch.randn(1, 1 + 8 * 8, 96)
    before = attention(tokens, 8, 8)

    def reached(place: int) -> tuple[bool, torch.Tensor]:
        other = tokens.clone()
        other[0, place] += 1.0
        moved = (attention(other, 8, 8) != before).any(dim=-1)[0]
        return bool(moved[0]), moved[1:].view(8, 8)

    sees, grid = reached(1)  # the first of the grid
    assert sees
    assert bool(grid[:4, :4].all())
    assert int(grid.sum()) == 16
    sees, grid = reached(1 + 8 * 4 + 4)  # in the third window of each axis
    assert sees
    assert bool(grid[2:, 2:].all())
    assert int(grid.sum()) == 36
    sees, grid = reached(0)  # the global token
    assert sees
    assert bool(grid.all())


def test_the_last_stages_attend_to_the_whole_grid() -> None:
    torch.manual_seed(0)
    attention = ViLTiny(window=2).stages[3].blocks[0].attention
    tokens = torch.randn(1, 7 * 6, 768)
    other = tokens.clone()
    other[0, 0] += 1.0
    assert bool((attention(tokens, 7, 6) != attention(other, 7, 6)).any(dim=-1).all())


def test_bias_of_the_global_token_counts_for_every_query() -> None:
    torch.manual_seed(0)
    attention = ViLTiny(window=2).stages[0].blocks[0].attention
    tokens = torch.randn(1, 1 + 4 * 4, 96)
    before = attention(tokens, 4, 4)
    with torch.no_grad():
        attention.global_bias.fill_(30.0)  # all then see the global token alone
    after = attention(tokens, 4, 4)
    assert bool((after != before).any(dim=-1).all())
    torch.testing.assert_close(after, after[:, :1].expand_as(after), rtol=1e-4, atol=1e-5)  # fp32
