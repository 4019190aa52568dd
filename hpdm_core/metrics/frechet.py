"""The Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features, in float64.

``|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))``. The last term is the nuclear norm of ``R_a R_b^T``
where ``S = R^T R`` comes from a QR decomposition of the centred features. So no square root of a
near-singular product is ever taken, and the distance is right for any number of samples, also below the
number of features, where the usual ``sqrtm`` returns large complex numbers. Not FVD: that is this distance
on one network's features.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpdm_core.errors import TroubleError

__all__ = ["Features", "checked_features", "frechet_distance"]

Features = NDArray[np.float64]


def checked_features(features: Any, *, least: int, of: str) -> Features:
    """Return ``features`` as float64 [n, d]; raises TroubleError below ``least`` rows or with values not
    finite.
    """
    made = np.asarray(features, dtype=np.float64)
    if made.ndim != 2 or made.shape[0] < least:
        raise TroubleError(f"{of}: features of shape {list(made.shape)}; needed are at least {least} rows")
    if not np.isfinite(made).all():
        rows = int((~np.isfinite(made)).any(axis=1).sum())
        raise TroubleError(f"{of}: {rows} of {made.shape[0]} feature vectors hold NaN or infinity")
    return made


def frechet_distance(first: Any, second: Any, *, ddof: int = 0) -> float:
    """Return the distance between features ``first`` [n, d] and ``second`` [m, d] (squared units of the
    features).

    ``ddof``: covariances are divided by n - ddof (0 as StyleGAN-V's FVD, 1 as numpy.cov). Never negative;
    exactly 0.0 for equal inputs. Symmetric up to rounding.
    """
    a = checked_features(first, least=1 + ddof, of="frechet")
    b = checked_features(second, least=1 + ddof, of="frechet")
    if a.shape == b.shape and np.array_equal(a, b):
        return 0.0
    shift = a.mean(axis=0) - b.mean(axis=0)
    root_a = _root(a, ddof=ddof)
    root_b = _root(b, ddof=ddof)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    value = shift @ shift + (root_a**2).sum() + (root_b**2).sum() - 2.0 * cross
    return max(float(value), 0.0)


def _root(features: Features, *, ddof: int) -> Features:
    """Return R [min(n, d), d] with R^T R = covariance."""
    centred = (features - features.mean(axis=0)) / np.sqrt(features.shape[0] - ddof)
    return np.asarray(np.linalg.qr(centred, mode="r"), dtype=np.float64)
