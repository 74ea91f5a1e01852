"""Numbers that move while training goes on: pure functions of how much of it is done."""

from __future__ import annotations

import math


def cosine(start: float, end: float, *, progress: float) -> float:
    """Go from `start` to `end` along half a cosine: slow, fast, slow. Progress outside [0, 1] counts as its nearer end.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 without restarts.
    """
    return _between(start, end, share=(1 + math.cos(math.pi * _clamp(progress))) / 2)


def linear(start: float, end: float, *, progress: float) -> float:
    """Go from `start` to `end` on a straight line. Progress outside [0, 1] counts as its nearer end."""
    return _between(start, end, share=1 - _clamp(progress))


def _between(start: float, end: float, *, share: float) -> float:
    return start * share + end * (1 - share)  # exact at both ends


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
