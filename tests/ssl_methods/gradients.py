"""N ranks against one process: what a loss of two views does to a shared linear map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssl_methods.collectives import rank, world_size
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import random_views, rank_slice

Loss = Callable[[Tensor, Tensor], Tensor]
INPUT_DIM, OUTPUT_DIM, NUM_SAMPLES = 6, 5, 16


def value_and_gradient(loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the loss of this rank's part of a fixed global batch, and its gradient for the shared map."""
    weight = torch.randn(INPUT_DIM, OUTPUT_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight.requires_grad_()
    views = random_views(NUM_SAMPLES, INPUT_DIM)
    z1, z2 = (rank_slice(view, rank(), world_size()) @ weight for view in views)
    value = loss(z1, z2)
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


def assert_ranks_equal_one_process(loss: Loss, *, num_ranks: int) -> None:
    """Compare value on every rank and the rank-averaged gradient with one process on the whole batch."""
    value, gradient = value_and_gradient(loss)
    results = run_on_ranks(num_ranks, value_and_gradient, loss)
    for rank_value, _ in results:
        torch.testing.assert_close(rank_value, value, rtol=1e-10, atol=0)  # float64 sums in another order
    average = torch.stack([rank_gradient for _, rank_gradient in results]).mean(0)
    torch.testing.assert_close(average, gradient, rtol=1e-9, atol=1e-12)
