"""Kernel video distance: the unbiased squared maximum mean discrepancy with a cubic polynomial kernel.

``k(x, y) = (x.y / d + 1)^3``, as DIGAN and TATS compute it on I3D logits. The estimate is unbiased: it has no offset
that depends on the number of clips, and can be negative.
"""

from typing import Any

import numpy as np

from hpdm_core.metrics.distances.frechet import checked_features
from hpdm_core.metrics.interface import Features

__all__ = ["kernel_distance"]

_ROWS = 1024  # rows of a kernel matrix in memory at once: 10,000 clips per side need 80 MB instead of 800


def kernel_distance(first: Any, second: Any) -> float:
    """Return the distance between features ``first`` [n, d] and ``second`` [m, d], n and m at least 2."""
    x = checked_features(first, least=2, of="kvd")
    y = checked_features(second, least=2, of="kvd")
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
    return within_x + within_y - 2.0 * _kernel_sum(x, y) / (n * m)


def _kernel_sum(x: Features, y: Features) -> float:
    width = x.shape[1]
    total = 0.0
    for start in range(0, len(x), _ROWS):
        block = x[start : start + _ROWS] @ y.T
        block /= width
        block += 1.0
        total += float(np.vdot(block * block, block))  # block ** 3 takes ten times as long
    return total


def _kernel_diagonal(x: Features) -> float:
    return float((((x * x).sum(axis=1) / x.shape[1] + 1.0) ** 3).sum())
