"""A queue of negatives: the newest keys of earlier batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor, nn

from ssl_methods.precision import in_full_precision


class NegativeQueue(nn.Module):
    """Hold `size` keys of unit length, one a row; a new batch takes the place of the oldest.

    It starts with random directions. All of it lies in buffers, equal on all ranks if all enqueue the same keys.

    Source: He et al. 2020, arXiv:1911.05722, algorithm 1.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        # where the next batch goes; a tensor, so that the GPU need not be waited for
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def check_batch(self, num_keys: int) -> None:
        """Refuse a batch of keys that would straddle the queue's end.

        Raises:
            ValueError: the queue's size is no multiple of the batch.
        """
        size = len(self.keys)
        if size % num_keys != 0:
            fitting = max(size // num_keys, 1) * num_keys
            raise ValueError(
                f"queue_size: {size} is no multiple of the global batch of {num_keys}; write {fitting}, say"
            )

    def negatives(self) -> Float[Tensor, "size dim"]:
        """Return a copy of the keys: a loss keeps it for its backward pass, `enqueue` overwrites the original."""
        return self.keys.clone()

    @torch.no_grad()
    @in_full_precision
    def enqueue(self, keys: Float[Tensor, "batch dim"]) -> None:
        """Put a batch in, of any length (normalised here): the keys of all ranks, in rank order.

        Raises:
            ValueError: the queue's size is no multiple of the batch.
        """
        self.check_batch(len(keys))
        rows = self.position + torch.arange(len(keys), device=keys.device)
        self.keys.index_copy_(0, rows, F.normalize(keys, dim=1).to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(len(self.keys))
