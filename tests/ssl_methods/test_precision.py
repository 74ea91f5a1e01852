from __future__ import annotations

import torch

from ssl_methods.losses.negative_cosine import negative_cosine_loss


def test_tensors_given_by_name_are_widened_like_those_given_by_place() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 8, 5, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_name = negative_cosine_loss(predictions=first, targets=second)
    assert by_name.dtype == torch.float32
    assert torch.equal(by_name, negative_cosine_loss(first, second))
