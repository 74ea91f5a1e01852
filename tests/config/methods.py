"""Methods of others, installed for a test."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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

STAGED = '''
from pathlib import Path

import torch
from torch import nn

from ssl_methods.method import Method, StepOutput


class Staged(Method):
    """Pull the features of both views to a target, which moves at half time."""

    default_views = "small_grey"

    def __init__(self, backbone, *, target: str = "random", most_ranks: int = 100):
        super().__init__(backbone)
        self.projector = nn.Linear(backbone.embed_dim, 8)
        self.file, self.most_ranks, self.stage = target, most_ranks, 0
        self.register_buffer("target", torch.zeros(()))

    @property
    def num_stages(self):
        return 2

    def check_batches(self, *, num_views, global_batch, num_ranks=1):
        if num_ranks > self.most_ranks:
            raise ValueError(f"takes {self.most_ranks} ranks at most, not {num_ranks}; start fewer")

    def advice(self, *, global_batch, num_ranks):
        return (f"was published with 4096 images a batch, not {global_batch} on {num_ranks}",)

    def pretrained(self):
        return {} if self.file == "random" else {"target": self.file}

    def load_pretrained(self, say=print):
        if self.file == "random":
            return
        if not Path(self.file).exists():
            raise ValueError(f"target: {self.file}: no such file")
        self.target.fill_(float(Path(self.file).read_text()))
        say(f"target: {self.file}: loaded")

    def before_step(self, progress):
        self.stage = progress.stage

    def forward(self, views, labels=None):
        features = [self.projector(self.backbone(view)) for view in views]
        loss = sum((each - self.target - self.stage).square().mean() for each in features)
        return StepOutput(loss, {"stage": torch.tensor(float(self.stage)), "embedding_std": features[0].detach().std()})
'''


def bare_method_installed(folder: Path) -> AbstractContextManager[str]:
    """Install a method with a parameter of its own for a while; enter with its name."""
    return _installed(folder, "bare", BARE)


def staged_method_installed(folder: Path) -> AbstractContextManager[str]:
    """Install a method for a while that has two stages, advice, and a file to begin with; enter with its name."""
    return _installed(folder, "staged", STAGED)


@contextmanager
def _installed(folder: Path, name: str, text: str) -> Iterator[str]:
    package = importlib.import_module("ssl_methods.methods")
    (folder / f"{name}.py").write_text(text)
    package.__path__.append(str(folder))
    try:
        yield name
    finally:
        package.__path__.remove(str(folder))
        sys.modules.pop(f"ssl_methods.methods.{name}", None)
