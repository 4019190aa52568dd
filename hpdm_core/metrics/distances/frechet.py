"""The Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features, in float64.

``|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))``. With ``S = R^T R`` from a QR decomposition of the centred
features, ``Tr (S_a S_b)^(1/2)`` is the nuclear norm of ``R_a R_b^T``, and the whole trace is the minimum of
``|R_a - Q R_b|^2`` over orthogonal Q (Procrustes). It is computed in this form, which needs no square root of a
near-singular product and no difference of large traces. So the distance is accurate for any number of samples (also
below the number of features, where the usual ``sqrtm`` returns large complex numbers) and for sets that nearly agree.
FVD is this distance on the features of one particular network.

If only the mean and covariance of a set are known, as in other tools' files, the symmetric form
``Tr (S_a^(1/2) S_b S_a^(1/2))^(1/2)`` is used, which loses half of the digits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpdm_core.base.errors import TroubleError
from hpdm_core.metrics.interface import Features

__all__ = [
    "Gaussian",
    "checked_features",
    "distance_between",
    "fit_gaussian",
    "frechet_distance",
    "frechet_from_moments",
]


@dataclass(frozen=True)
class Gaussian:
    """A fitted Gaussian: ``mean`` [d] and ``root`` [min(n, d), d], whose root^T root is the covariance."""

    mean: Features
    root: Features
    count: int
    ddof: int

    @property
    def covariance(self) -> Features:
        """The covariance [d, d]."""
        return self.root.T @ self.root


def checked_features(features: Any, *, least: int, of: str) -> Features:
    """Return ``features`` as float64 [n, d]; raises TroubleError for fewer than ``least`` rows or non-finite values."""
    made = np.asarray(features, dtype=np.float64)
    if made.ndim != 2 or made.shape[0] < least:
        raise TroubleError(f"{of}: features of shape {list(made.shape)}; needed are at least {least} rows")
    if not np.isfinite(made).all():
        rows = int((~np.isfinite(made)).any(axis=1).sum())
        raise TroubleError(f"{of}: {rows} of {made.shape[0]} feature vectors hold NaN or infinity")
    return made


def fit_gaussian(features: Any, *, ddof: int = 0) -> Gaussian:
    """Return the Gaussian of ``features`` [n, d]; covariances are divided by n - ddof."""
    made = checked_features(features, least=1 + ddof, of="frechet")
    count = made.shape[0]
    mean = made.mean(axis=0)
    root = np.linalg.qr((made - mean) / np.sqrt(count - ddof), mode="r")
    return Gaussian(mean=mean, root=np.asarray(root, dtype=np.float64), count=count, ddof=ddof)


def distance_between(first: Gaussian, second: Gaussian) -> float:
    """Return the distance between two fitted Gaussians. Raises TroubleError for different widths."""
    _check_widths(first.mean, second.mean)
    if first.root.shape == second.root.shape and (
        np.array_equal(first.mean, second.mean) and np.array_equal(first.root, second.root)
    ):
        return 0.0
    rows = max(len(first.root), len(second.root))
    a, b = _padded(first.root, rows), _padded(second.root, rows)
    left, _, right = np.linalg.svd(a @ b.T)
    shift = first.mean - second.mean
    apart = a - left @ (right @ b)
    return float(shift @ shift + (apart * apart).sum())


def frechet_distance(first: Any, second: Any, *, ddof: int = 0) -> float:
    """Return the distance between features ``first`` [n, d] and ``second`` [m, d], in squared feature units.

    ``ddof``: covariances are divided by n - ddof (0 as StyleGAN-V's FVD, 1 as numpy.cov). Never negative;
    exactly 0.0 for equal inputs. Symmetric up to rounding.
    """
    a = checked_features(first, least=1 + ddof, of="frechet")
    b = checked_features(second, least=1 + ddof, of="frechet")
    _check_widths(a[0], b[0])
    if a.shape == b.shape and np.array_equal(a, b):
        return 0.0
    return distance_between(fit_gaussian(a, ddof=ddof), fit_gaussian(b, ddof=ddof))


def frechet_from_moments(
    first_mean: Any, first_covariance: Any, second_mean: Any, second_covariance: Any
) -> float:
    """Return the distance between Gaussians given by means [d] and covariances [d, d].

    For files of other tools. Less accurate than `frechet_distance` by about 1e-7 of the traces. Never negative;
    exactly 0.0 for equal inputs. Raises TroubleError for shapes that do not fit, non-finite values, and covariances
    that are not symmetric.
    """
    mean_a, cov_a = _checked_moments(first_mean, first_covariance)
    mean_b, cov_b = _checked_moments(second_mean, second_covariance)
    _check_widths(mean_a, mean_b)
    if np.array_equal(mean_a, mean_b) and np.array_equal(cov_a, cov_b):
        return 0.0
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = root @ cov_b @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)).sum()
    shift = mean_a - mean_b
    value = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return max(float(value), 0.0)


def _padded(root: Features, rows: int) -> Features:
    return np.concatenate([root, np.zeros((rows - len(root), root.shape[1]))]) if len(root) < rows else root


def _check_widths(first: Features, second: Features) -> None:
    if first.shape != second.shape:
        raise TroubleError(
            f"frechet: features of width {first.size} against features of width {second.size}; they come "
            "from different extractors"
        )


def _checked_moments(mean: Any, covariance: Any) -> tuple[Features, Features]:
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise TroubleError(
            f"frechet: a mean of shape {list(mu.shape)} with a covariance of shape {list(sigma.shape)}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise TroubleError("frechet: a mean or covariance with NaN or infinity")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * float(np.abs(sigma).max(initial=0.0))):
        raise TroubleError("frechet: a covariance that is not symmetric")
    return mu, (sigma + sigma.T) / 2
