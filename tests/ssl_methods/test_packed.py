from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_methods.backbones.tiny_binary import TinyBinary
from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.binary import BinaryConv2d, binarise_weights, binary_convolutions
from ssl_methods.packed import pack, settle_zeros, unpack


def trained(seed: int = 0) -> TinyBinary:
    """A network in which no tensor has the numbers of a fresh one."""
    torch.manual_seed(seed)
    network = TinyBinary()
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return network.eval()


def layer_of(values: list[float]) -> nn.Sequential:
    layer = BinaryConv2d(len(values), 1, 1)
    layer.weight.data.copy_(torch.tensor(values).view(1, -1, 1, 1))
    return nn.Sequential(layer)


@torch.no_grad()
def features_of(network: nn.Module) -> Tensor:
    return network(torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1)))


def test_unpacked_network_has_the_features_of_the_packed_one_bit_for_bit(tmp_path: Path) -> None:
    network = trained()
    save_file(pack(network), tmp_path / "file")
    there = TinyBinary()
    there.load_state_dict(unpack(load_file(tmp_path / "file")), strict=True)
    assert torch.equal(features_of(there.eval()), features_of(network))
    assert features_of(network).std() > 0.01


def test_file_has_a_bit_for_each_binary_weight(tmp_path: Path) -> None:
    network = trained()
    tensors = pack(network)
    num_weights = sum(layer.weight.numel() for _, layer in binary_convolutions(network))
    assert sum(value.numel() for name, value in tensors.items() if name.endswith(".signs")) == num_weights / 8
    assert not any(name.endswith("conv.weight") for name in tensors)
    assert torch.equal(tensors["stem.0.weight"], network.stem[0].weight)


def test_layout_is_the_documented_one() -> None:
    tensors = pack(layer_of([0.5, -0.5, 0.25, -0.25, -1.0, -0.5, -0.5, -0.5, -0.5, 1.0]))
    assert tensors["0.signs"].tolist() == [[0b1010_0000, 0b0100_0000]]
    assert tensors["0.signs"].dtype == torch.uint8
    assert tensors["0.alpha"].tolist() == [pytest.approx(0.55)]
    assert tensors["0.shape"].tolist() == [1, 10, 1, 1]
    assert tensors.keys() == {"0.signs", "0.alpha", "0.shape"}


def test_zeros_of_either_sign_are_packed_as_positive_ones() -> None:
    network = layer_of([0.0, -0.0, -0.5, 0.0, -1.0])
    assert pack(network)["0.signs"].tolist() == [[0b1101_0000]]
    assert torch.equal(pack(network)["0.signs"], pack(network)["0.signs"])
    x = torch.eye(5).view(5, 5, 1, 1)
    assert network(x).flatten().tolist() == pytest.approx([0, 0, -0.3, 0, -0.3])  # as it is trained
    assert settle_zeros(network) == 3
    assert settle_zeros(network) == 0
    assert network(x).flatten().tolist() == pytest.approx([0.3, 0.3, -0.3, 0.3, -0.3])
    there = layer_of([1.0] * 5)
    there.load_state_dict(unpack(pack(network)))
    assert torch.equal(there(x), network(x))


def test_networks_that_are_not_binary_or_not_yet_are_refused() -> None:
    with pytest.raises(ValueError, match="the network has no binary convolution"):
        pack(TinyResNet())
    network = trained()
    binarise_weights(network, False)
    with pytest.raises(ValueError, match=r"weights of blocks\.0\.conv are not binary yet: .* in its first stage"):
        pack(network)


def test_damaged_files_are_refused() -> None:
    with pytest.raises(ValueError, match="no packed network: it has no tensor `signs`"):
        unpack(TinyResNet().state_dict())
    tensors = pack(layer_of([1.0] * 10))
    with pytest.raises(ValueError, match=r"no packed network: it has no 0\.alpha"):
        unpack({name: value for name, value in tensors.items() if name != "0.alpha"})
    with pytest.raises(ValueError, match=r"0\.signs: shape \(1, 1\) for weights of shape \(1, 10, 1, 1\)"):
        unpack({**tensors, "0.signs": tensors["0.signs"][:, :1]})
