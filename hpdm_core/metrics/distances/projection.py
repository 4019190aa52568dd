"""Scale features and, if there are few clips, reduce their dimension, before a distance is computed.

Everything is fitted on the reference clips alone (real, training split), never on the clips compared with them. The
scalings are `hpdm_core.metrics.interface.Scaling`: after scaling, a difference of 1 is one standard deviation of the
real clips, whatever the features' units.
"""

from dataclasses import dataclass

import numpy as np

from hpdm_core.metrics.interface import Features, Scaling

__all__ = ["FEW", "PER_DIRECTION", "Projection", "dimensions_used", "fit_projection"]

FEW = 10
"""With fewer clips per feature than this in the smaller set, a covariance estimate is mostly noise."""
PER_DIRECTION = 4
"""Least reference clips per whitened direction: with fewer, the variances themselves are mostly noise."""

_LEAST_VARIANCE = 1e-6  # of a direction of standardised features; smaller variances are rounding errors


@dataclass(frozen=True)
class Projection:
    """Centre [d], scale [d], and directions [d, k] or None."""

    mean: Features
    scale: Features
    directions: Features | None

    def __call__(self, features: Features) -> Features:
        """Return ``features`` [n, d] projected to [n, k]; [n, d] without directions."""
        scaled = (features - self.mean) / self.scale
        return scaled if self.directions is None else scaled @ self.directions


def dimensions_used(width: int, *, fakes: int, reals: int, limit: int | None, scaling: Scaling) -> int:
    """Return how many dimensions a distance on ``width`` features keeps.

    At most ``limit`` if there are few clips (`FEW`); otherwise, or without a limit, all. Whitening divides by variances
    of the reference, so it keeps at most one direction per `PER_DIRECTION` reference clips.
    """
    kept = width if limit is None or min(fakes, reals) >= FEW * width else min(limit, width)
    return min(kept, max(reals // PER_DIRECTION, 1)) if scaling == "directions" else kept


def fit_projection(reference: Features, *, scaling: Scaling, dimensions: int) -> Projection:
    """Fit on ``reference`` [n, d] and keep its ``dimensions`` leading principal directions.

    All are kept for ``dimensions`` of d or more. A feature that is constant over the reference is not rescaled.
    """
    width = reference.shape[1]
    mean, scale = np.zeros(width), np.ones(width)
    if scaling != "none":
        mean, spread = reference.mean(axis=0), reference.std(axis=0)
        # The threshold is relative to the feature's size: rounding makes a constant feature vary slightly.
        scale = np.where(spread <= 1e-6 * np.maximum(1.0, np.abs(mean)), 1.0, spread)
    if scaling != "directions" and dimensions >= width:
        return Projection(mean=mean, scale=scale, directions=None)
    scaled = (reference - mean) / scale
    centred = scaled - scaled.mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    kept = slice(None, -min(dimensions, width) - 1, -1)
    directions = vectors[:, kept]
    if scaling == "directions":
        directions = directions / np.sqrt(np.maximum(variances[kept], _LEAST_VARIANCE))
    return Projection(mean=mean, scale=scale, directions=np.ascontiguousarray(directions))
