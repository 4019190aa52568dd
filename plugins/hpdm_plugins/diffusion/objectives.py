"""Objectives: target, decoder and loss weight, which belong together.

Both predict v under input scaling; they differ in the noise level at which v is defined. ``sigma_data`` is the
assumed standard deviation of the data, 1 in Snap Video, .5 in EDM (2206.00364, Table 1). At noise levels below it,
the network mainly predicts the noise; above it, the clean patch. Small networks predict the clean patch much better
than the noise.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdm_core.diffusion import per_row
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["EffectiveV", "SnapV"]

Positive = Annotated[float, Field(gt=0)]


class SnapV:
    """v at sigma, decoded with the input scale: Snap Video (2402.14797), Table 1.

    With d = ``sigma_data`` and the target v = (d^2 n - sigma x) / (d sqrt(sigma^2 + d^2)),
    x = (sigma_in d^2 z - sigma_in sigma d sqrt(sigma^2 + d^2) v) / (sigma_in sigma^2 + d^2).
    The weighting ``c`` is (sigma^2 + d^2)^2 / (sigma^2 + d^2 / sigma_in)^2, which weights the squared error of x by
    1 / d^2 + 1 / sigma^2; the weighting ``v`` is 1.
    """

    def __init__(self, *, weighting: Literal["c", "v"] = "c", sigma_data: Positive = 1.0) -> None:
        self.weighting = weighting
        self.variance = sigma_data**2

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        return _velocity(clean, noise, per_row(sigma, clean), self.variance)

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma, noisy)
        scale = sigma_in / (sigma_in * s.square() + self.variance)
        root = (self.variance * (s.square() + self.variance)).sqrt()
        return scale * self.variance * noisy - scale * s * root * prediction

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        if self.weighting == "v":
            return torch.ones_like(sigma)
        square = sigma.square()
        return ((square + self.variance) / (square + self.variance / sigma_in)).square()


class EffectiveV:
    """Exact v at the noise level s = sigma_eff = sigma_in sigma, with loss weight 1.

    With d = ``sigma_data``: v = (d^2 n - s x) / (d sqrt(s^2 + d^2));
    x = d^2 sigma_in z / (s^2 + d^2) - s d / sqrt(s^2 + d^2) v. The squared error of x has the weight 1 / d^2 + 1 / s^2.
    """

    def __init__(self, *, sigma_data: Positive = 1.0) -> None:
        self.variance = sigma_data**2

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        return _velocity(clean, noise, per_row(sigma_in * sigma, clean), self.variance)

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma_in * sigma, noisy)
        total = s.square() + self.variance
        out = s * (self.variance / total).sqrt()
        return self.variance * sigma_in * noisy / total - out * prediction

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        return torch.ones_like(sigma)


def _velocity(clean: Tensor, noise: Tensor, sigma: Tensor, variance: float) -> Tensor:
    """Return (d^2 n - sigma x) / (d sqrt(sigma^2 + d^2)), d^2 = ``variance``; unit variance if x has variance d^2."""
    return (variance * noise - sigma * clean) / (variance * (sigma.square() + variance)).sqrt()


@hookimpl
def register_objectives(register: Register) -> None:
    """Add the built-in objectives."""
    register("snap_v", SnapV, source="Snap Video (2402.14797), Table 1; HPDM names only 'v-prediction'")
    register("effective_v", EffectiveV, source="Salimans and Ho (2202.00512), v at the effective noise level")
