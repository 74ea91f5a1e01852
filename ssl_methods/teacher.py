"""A frozen teacher: an encoder that was trained elsewhere, for a student to imitate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_methods.backbones import build
from ssl_methods.heads import build_mlp
from ssl_methods.pretrained import load_encoder

UNTRAINED = "random"
"""In place of a file of weights: the teacher keeps its random ones, as a control."""


class Teacher(nn.Module):
    """A backbone and its head (Linear - ReLU - Linear), never trained, never in training mode.

    Its weights lie in the method's state, so that a training that goes on needs no file.

    Args:
        name: of the backbone: own, torchvision or timm.
        hidden_dim: width of the head's hidden layer; 0 for no head, the backbone's own features.
        embed_dim: width of the embedding.
        weights: path or URL of a file that `pretrained.load_encoder` reads, or `random`.
        sha256: of that file; empty for no check.
        batch_norm: `eval` normalises with the moments that the file came with. `train` normalises with those of a
            rank's part of the batch, and moves the others, as some authors' code does by accident.
        stem: of the backbone; `small` for images of about 32 px.

    Raises:
        ValueError: unknown backbone, or features of another width than `embed_dim` where there is no head.
    """

    loaded: Tensor

    def __init__(
        self,
        name: str,
        *,
        hidden_dim: int,
        embed_dim: int,
        weights: str,
        sha256: str = "",
        batch_norm: Literal["eval", "train"] = "eval",
        stem: build.Stem = "default",
    ) -> None:
        super().__init__()
        try:
            self.backbone = build.build(name, stem=stem)
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from error
        width = self.backbone.embed_dim
        if hidden_dim == 0 and width != embed_dim:
            raise ValueError(
                f"teacher_hidden_dim: 0 takes the features of {name}, {width} wide, for embed_dim {embed_dim}; "
                f"write embed_dim: {width}, or the hidden width of the teacher's head"
            )
        self.projector: nn.Module = nn.Identity()
        if hidden_dim > 0:
            self.projector = build_mlp([width, hidden_dim, embed_dim], activation=nn.ReLU)
        self.weights = weights
        self.sha256 = sha256
        self.batch_norm = batch_norm
        self.register_buffer("loaded", torch.tensor(weights == UNTRAINED))
        self._seen_loaded = False
        self.register_load_state_dict_post_hook(_look_again)  # type: ignore[no-untyped-call]  # torch leaves it bare
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return the embeddings, of any length, without gradient.

        Raises:
            RuntimeError: no weights were ever loaded.
        """
        if not self._seen_loaded:  # looked up once, as reading a tensor waits for the GPU
            self._seen_loaded = bool(self.loaded)
        if not self._seen_loaded:
            raise RuntimeError(f"teacher_weights: {self.weights or 'none'}: not loaded; call load_pretrained first")
        embeddings: Tensor = self.projector(self.backbone(images))
        return embeddings

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode; with `batch_norm` "train", batch norms alone follow the mode."""
        super().train(False)
        if self.batch_norm == "train":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.train(mode)
        return self

    def pretrained(self) -> Mapping[str, str]:
        """Return the file that `load` reads, by its knob; nothing for an untrained teacher."""
        return {} if self.weights == UNTRAINED else {"teacher_weights": self.weights}

    def load(self, say: Callable[[str], None] = print) -> None:
        """Load the weights, all or nothing.

        Args:
            say: is told what was loaded.

        Raises:
            ValueError: the file is missing, or does not fit; names the knob `teacher_weights`.
        """
        if self.weights == UNTRAINED:
            say("teacher_weights: random: the teacher stays untrained, as a control")
            return
        try:
            report = load_encoder(self.weights, self.backbone, self.projector, sha256=self.sha256)
        except ValueError as error:
            raise ValueError(f"teacher_weights: {error}") from error
        self.loaded.fill_(True)
        say(f"teacher_weights: {report.text()}")


def _look_again(teacher: Teacher, _: object) -> None:
    teacher._seen_loaded = False
