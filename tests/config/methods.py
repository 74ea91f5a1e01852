"""Methods of others, installed for a test."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BARE = '''
import torch
from torch import nn

from ssl_methods.method import Method


class Bare(Method):
    """Hold a trained parameter directly."""

    default_views = "small_grey"

    def __init__(self, backbone):
        super().__init__(backbone)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, views, labels=None):
        raise NotImplementedError
'''


@contextmanager
def bare_method_installed(folder: Path) -> Iterator[str]:
    """Install a method with a parameter of its own for a while; yield its name."""
    package = importlib.import_module("ssl_methods.methods")
    (folder / "bare.py").write_text(BARE)
    package.__path__.append(str(folder))
    try:
        yield "bare"
    finally:
        package.__path__.remove(str(folder))
        sys.modules.pop("ssl_methods.methods.bare", None)
