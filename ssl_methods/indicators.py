"""Numbers that show a collapse while it happens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from jaxtyping import Float
from torch import Tensor

from ssl_methods.precision import in_full_precision


@in_full_precision
def embedding_std(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return the mean over features of the standard deviation of unit-length embeddings, times sqrt(dim).

    About 1 for embeddings spread over the sphere, 0 when all images map to one point. Of this rank's samples, detached.

    Source: Chen and He 2020, arXiv:2011.10566, section 4.1.
    """
    unit = F.normalize(embeddings.detach(), dim=1)
    spread: Tensor = unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])
    return spread


def entropy(probabilities: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of each distribution, nats: 0 for one class, ln(classes) if all are as likely."""
    found: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return found
