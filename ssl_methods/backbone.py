"""What every backbone is: a module from image to one feature vector of known width."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Map a batch of normalised images to features of width `embed_dim`."""

    embed_dim: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return one feature vector an image."""


class Encoded(NamedTuple):
    """An image as a whole, and region by region, after the last norm."""

    features: Float[Tensor, "batch embed_dim"]
    tokens: Float[Tensor, "batch tokens embed_dim"]


class TokenBackbone(Backbone):
    """A backbone that also has a feature vector for each region of an image."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Return the features that `forward` gives, and those of the regions, row by row."""

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return one feature vector an image."""
        return self.encode(images).features
