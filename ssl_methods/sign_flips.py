"""How the weights of binary convolutions move: how many change sign, how many lie where no gradient reaches them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_methods.binary import binary_convolutions


class SignFlips(nn.Module):
    """Count over all binary convolutions of a network what the last step did; buffers, so that a checkpoint has it.

    The signs before the step are kept during the step only, a byte a weight.
    """

    flip_rate: Tensor
    saturated_fraction: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flip_rate", torch.zeros(()))
        self.register_buffer("saturated_fraction", torch.zeros(()))
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self, network: nn.Module) -> None:
        """Keep the signs; before the optimizer's step."""
        self._before = {name: convolution.weight < 0 for name, convolution in binary_convolutions(network)}

    @torch.no_grad()
    def compare(self, network: nn.Module) -> None:
        """Count the signs that are others than those remembered, and the weights beyond 1; after the step."""
        weights = {name: convolution.weight for name, convolution in binary_convolutions(network)}
        if weights.keys() != self._before.keys() or not weights:
            return
        num_weights = sum(weight.numel() for weight in weights.values())
        flips = [((weight < 0) ^ self._before[name]).count_nonzero() for name, weight in weights.items()]
        beyond = [(weight.abs() > 1).count_nonzero() for weight in weights.values()]
        self.flip_rate.copy_(torch.stack(flips).sum() / num_weights)
        self.saturated_fraction.copy_(torch.stack(beyond).sum() / num_weights)
        self._before = {}

    def metrics(self) -> dict[str, Tensor]:
        """Return copies of both, named for a log."""
        return {
            "sign_flip_rate": self.flip_rate.clone(),
            "saturated_fraction": self.saturated_fraction.clone(),
        }
