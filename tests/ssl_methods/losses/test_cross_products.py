from __future__ import annotations

import pytest
import torch

from ssl_methods.losses.cross_products import cross_products
from tests.ssl_methods.inputs import random_views

# a batch of 9 makes the matrix of features up to 17 of them, and products of samples from 18 on
each_way = pytest.mark.parametrize("dim", [5, 17, 18, 40])


@each_way
@pytest.mark.parametrize("same", [False, True])
def test_values_and_gradients_are_those_of_the_whole_matrix(dim: int, same: bool) -> None:
    x, y = (view.requires_grad_() for view in random_views(9, dim))
    y = x if same else y
    weights = torch.linspace(1, 2, dim, dtype=torch.float64)
    products = cross_products(x, y)
    matrix = x.T @ y
    rest = matrix - matrix.diagonal().diag()
    torch.testing.assert_close(products.diagonal, matrix.diagonal(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.off_diagonal, rest.square().sum(), rtol=1e-12, atol=0)
    found = torch.autograd.grad(products.diagonal @ weights + 3 * products.off_diagonal, [x, y])
    expected = torch.autograd.grad(matrix.diagonal() @ weights + 3 * rest.square().sum(), [x, y])
    for ours, goal in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, goal, rtol=1e-10, atol=1e-9)  # differences of large sums


def test_many_features_in_single_precision_lose_little_in_the_difference() -> None:
    x, y = (view.float() for view in random_views(32, 64))
    exact = cross_products(x.double(), y.double()).off_diagonal
    assert float(cross_products(x, y).off_diagonal) == pytest.approx(float(exact), rel=1e-5)
