from __future__ import annotations

import pytest
import torch

from ssl_methods.backbones.tiny_resnet import TinyResNet
from ssl_methods.methods.supervised import Supervised


def test_missing_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="supervised needs labels"):
        Supervised(TinyResNet(), num_classes=3)([torch.zeros(2, 3, 12, 12)])


def test_top1_is_the_share_of_right_answers() -> None:
    torch.manual_seed(0)
    method = Supervised(TinyResNet(), num_classes=3)
    torch.nn.init.zeros_(method.classifier.weight)
    method.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0])  # always answers 1
    output = method([torch.randn(4, 3, 12, 12)], torch.tensor([1, 1, 1, 0]))
    assert output.metrics["top1"].item() == 0.75
