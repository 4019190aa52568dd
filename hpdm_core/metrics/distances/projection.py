"""Bringing features to a common scale and, when clips are few, to few dimensions, before a distance is
taken.

Everything is fitted on the reference clips alone (real, training split), never on what is judged. The
scalings are `hpdm_core.metrics.interface.Scaling`: a distance of 1 is then one real standard deviation,
whatever the features' units.
"""

from dataclasses import dataclass

import numpy as np

from hpdm_core.metrics.interface import Features, Scaling

__all__ = ["FEW", "PER_DIRECTION", "Projection", "dimensions_used", "fit_projection"]

FEW = 10
"""Clips are few when the smaller set has less than this many per feature: a covariance is then mostly
noise.
"""
PER_DIRECTION = 4
"""Reference clips per whitened direction: with fewer the variances themselves are made up."""

_LEAST_VARIANCE = 1e-6  # of a direction of standardised features; below it lies rounding


@dataclass(frozen=True)
class Projection:
    """Centre [d], scale [d] and (or None) directions [d, k]."""

    mean: Features
    scale: Features
    directions: Features | None

    def __call__(self, features: Features) -> Features:
        """Return ``features`` [n, d] as [n, k]."""
        scaled = (features - self.mean) / self.scale
        return scaled if self.directions is None else scaled @ self.directions


def dimensions_used(width: int, *, fakes: int, reals: int, limit: int | None, scaling: Scaling) -> int:
    """Return how many dimensions a distance on ``width`` features keeps.

    At most ``limit`` when clips are few (`FEW`), all of them otherwise or without a limit. Whitening divides
    by variances of the reference, so it keeps no more than one direction per `PER_DIRECTION` of its clips.
    """
    kept = width if limit is None or min(fakes, reals) >= FEW * width else min(limit, width)
    return min(kept, max(reals // PER_DIRECTION, 1)) if scaling == "directions" else kept


def fit_projection(reference: Features, *, scaling: Scaling, dimensions: int) -> Projection:
    """Fit on ``reference`` [n, d] and keep its ``dimensions`` leading principal directions (all of them for
    d or more).

    A feature that is constant over the reference keeps its own unit.
    """
    width = reference.shape[1]
    mean, scale = np.zeros(width), np.ones(width)
    if scaling != "none":
        mean, spread = reference.mean(axis=0), reference.std(axis=0)
        # Relative to the feature's size: a constant computed in floating point is not exactly constant.
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
