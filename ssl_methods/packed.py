"""Binary networks in the memory of one bit a weight.

A packed network is a dictionary of tensors, to be written with safetensors. Of a binary convolution at `path` it holds

    path.signs   uint8, (outputs, bytes)  a bit a weight, 1 for +1 and 0 for -1. A filter's weights follow each other
                                          in the order (input, row, column), the first in the highest bit of the
                                          first byte; what is left of the last byte is 0.
    path.alpha   fp32, (outputs)          the length of every weight of a filter.
    path.shape   int64, (4)               outputs, inputs, rows and columns.

Everything else is there under its own name, as it was. A weight of exactly 0 has the sign +1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ssl_methods.binary import BinaryConv2d, binary_convolutions, mean_length


def pack(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors with the weights of its binary convolutions packed, on the CPU.

    Raises:
        ValueError: it has no binary convolution, or uses real weights in one.
    """
    convolutions = dict(binary_convolutions(network))
    if not convolutions:
        raise ValueError("the network has no binary convolution")
    real = [name for name, convolution in convolutions.items() if not bool(convolution.binary)]
    if real:
        raise ValueError(f"the weights of {real[0]} are not binary yet: the training is in its first stage")
    replaced = {f"{name}.{part}" for name in convolutions for part in ("weight", "binary")}
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items() if name not in replaced
    }
    for name, convolution in convolutions.items():
        tensors |= {f"{name}.{part}": value for part, value in _packed(convolution).items()}
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the network that `pack` was given, which computes the same features bit for bit.

    Its binary convolutions take their weights as they are, since these are products of sign and length already.

    Raises:
        ValueError: the tensors are not those of a packed network.
    """
    names = [name.removesuffix(".signs") for name in tensors if name.endswith(".signs")]
    if not names:
        raise ValueError("no packed network: it has no tensor `signs`")
    packed = {f"{name}.{part}" for name in names for part in ("signs", "alpha", "shape")}
    if missing := packed - tensors.keys():
        raise ValueError(f"no packed network: it has no {min(missing)}")
    state = {name: value for name, value in tensors.items() if name not in packed}
    for name in names:
        state[f"{name}.weight"] = _weights(name, *(tensors[f"{name}.{part}"] for part in ("signs", "alpha", "shape")))
        state[f"{name}.binary"] = torch.zeros((), dtype=torch.bool)
    return state


@torch.no_grad()
def settle_zeros(network: nn.Module) -> int:
    """Make the weights of binary convolutions that are exactly 0 so small and positive that only their sign changes.

    While it is trained a binary network uses 0 for them. Return how many there were.
    """
    count = 0
    for _, convolution in binary_convolutions(network):
        zeros = convolution.weight == 0
        count += int(zeros.sum())
        convolution.weight.masked_fill_(zeros, torch.finfo(convolution.weight.dtype).tiny)
    return count


def _packed(convolution: BinaryConv2d) -> dict[str, Tensor]:
    weight = convolution.weight.detach().cpu().float()
    signs = np.packbits((weight >= 0).flatten(1).numpy(), axis=1)
    return {
        "signs": torch.from_numpy(signs),
        "alpha": mean_length(weight),
        "shape": torch.tensor(weight.shape),
    }


def _weights(
    name: str, signs: UInt8[Tensor, "outputs bytes"], alpha: Float[Tensor, " outputs"], shape: Int[Tensor, " axes"]
) -> Float[Tensor, "outputs inputs rows columns"]:
    outputs, *fan_in = shape.tolist()
    num_weights = int(np.prod(fan_in))
    if signs.shape != (outputs, -(-num_weights // 8)) or alpha.shape != (outputs,):
        raise ValueError(f"{name}.signs: shape {tuple(signs.shape)} for weights of shape {tuple(shape.tolist())}")
    bits = np.unpackbits(signs.numpy(), axis=1, count=num_weights)
    positive = torch.from_numpy(bits).bool().view(outputs, *fan_in)
    lengths = alpha.view(-1, 1, 1, 1)
    return torch.where(positive, lengths, -lengths)
