"""What every backbone is: a module from image to one feature vector of known width."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Map a batch of normalised images to features of width `embed_dim`."""

    embed_dim: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        """Return one feature vector an image."""
