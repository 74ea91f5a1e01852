from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_methods.randomness import uniforms

KEYS = st.integers(min_value=0, max_value=2**63 - 1)


def test_numbers_are_pinned() -> None:
    # a change here changes every augmentation of every published run
    assert uniforms(1, epoch=2, sample_id=3, view=4, count=3) == [
        0.7035536821931601,
        0.007791121490299702,
        0.038629849441349506,
    ]


@given(KEYS, KEYS, KEYS, st.integers(0, 10))
def test_more_numbers_begin_with_the_same_ones(seed: int, epoch: int, sample_id: int, view: int) -> None:
    many = uniforms(seed, epoch=epoch, sample_id=sample_id, view=view, count=60)
    assert uniforms(seed, epoch=epoch, sample_id=sample_id, view=view, count=7) == many[:7]
    assert all(0 <= value < 1 for value in many)


def test_every_argument_matters() -> None:
    base = {"epoch": 0, "sample_id": 0, "view": 0, "count": 1}
    changed = [uniforms(0, **base), uniforms(1, **base)]
    changed += [uniforms(0, **{**base, name: 1}) for name in ("epoch", "sample_id", "view")]
    assert len({values[0] for values in changed}) == 5


def test_numbers_are_uniform_and_uncorrelated() -> None:
    rows = np.array([uniforms(0, epoch=0, sample_id=i, view=0, count=8) for i in range(5000)])
    counts, _ = np.histogram(rows, bins=20, range=(0, 1))
    expected = rows.size / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 99.9 % quantile with 19 degrees of freedom
    correlation = np.corrcoef(rows.T) - np.eye(8)
    assert float(np.abs(correlation).max()) < 5 / np.sqrt(5000)  # five standard errors
    following = float(np.corrcoef(rows[:-1, 0], rows[1:, 0])[0, 1])
    assert following == pytest.approx(0, abs=5 / np.sqrt(5000))
