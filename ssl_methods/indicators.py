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


@torch.no_grad()
@in_full_precision
def rank_me(embeddings: Float[Tensor, "batch dim"], *, epsilon: float = 1e-7) -> Float[Tensor, ""]:
    """Return the effective rank of a batch of embeddings: the exponential of the entropy of its singular values.

    Between 1, when all embeddings lie on one line, and min(batch, dim); compare only batches of the same size. Lengths
    of embeddings count, their mean is not taken out. Of this rank's samples, detached, float64; not a number if an
    embedding is not. It costs milliseconds, on CUDA with a wait for the device, so it is not for every step.

    Args:
        embeddings: what the loss sees, or what the encoder gives.
        epsilon: added to each singular value's share of their sum, as in the paper.

    Source: Garrido et al. 2022, arXiv:2210.02885, eq. 1.
    """
    is_finite = embeddings.isfinite().all()
    z = torch.where(is_finite, embeddings, 0).double()
    # Eigenvalues of the smaller product: 7 times faster than singular values of 256 x 2048. Squaring doubles the
    # digits that are needed, hence float64: in float32 a true rank of 8 comes out as 8.15.
    products = z @ z.T if len(z) <= z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(z.dtype).tiny) + epsilon
    return torch.where(is_finite, torch.exp(-(share * share.log()).sum()), math.nan)
