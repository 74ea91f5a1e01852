"""How features go together: the matrix x^T y over the global batch, of which losses need the diagonal and the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ssl_methods.collectives import all_reduce_sum, gather, world_size


class CrossProducts(NamedTuple):
    """The diagonal of x^T y, and the sum of the squares of all its other entries."""

    diagonal: Float[Tensor, " dim"]
    off_diagonal: Float[Tensor, ""]


def cross_products(x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"]) -> CrossProducts:
    """Return what losses need of x^T y, which sums over the samples of all ranks, by the cheaper of two products.

    Batches must be equal on all ranks. The same numbers, exact gradients, on every rank.
    """
    if x.shape[1] < 2 * len(x) * world_size():
        return CrossProducts(*_DiagonalAndRest.apply(all_reduce_sum(x.T @ y)))
    # The sum of all squares is also that of x x^T times y y^T, whose sides are samples instead of features. Where
    # there are so many more features than samples, most of it lies off the diagonal: the difference loses little,
    # unless one feature is longer than all others together by orders of magnitude.
    diagonal = all_reduce_sum((x * y).sum(dim=0))
    products = x @ gather(x).T
    others = products if y is x else y @ gather(y).T
    return CrossProducts(diagonal, all_reduce_sum((products * others).sum()) - diagonal.square().sum())


class _DiagonalAndRest(Function):
    """Keep nothing but the matrix, and make one more for its gradient; autograd would hold five at a time."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = matrix.diagonal().clone()
        matrix.fill_diagonal_(0.0)  # made for us alone
        ctx.save_for_backward(matrix)
        return diagonal, matrix.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_diagonal: Tensor, grad_rest: Tensor) -> Tensor:
        gradient: Tensor = ctx.saved_tensors[0] * (2 * grad_rest)
        gradient.diagonal().copy_(grad_diagonal)
        return gradient
