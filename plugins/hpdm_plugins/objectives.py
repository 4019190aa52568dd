"""Objectives: target, decoder and loss weight, which belong together.

Both predict v under input scaling; they differ in which noise level v is taken at. Data has standard
deviation 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hpdm_core.diffusion import per_row
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["EffectiveV", "SnapV"]


class SnapV:
    """v at sigma, decoded with the input scale: Snap Video (2402.14797), Table 1.

    v = (n - sigma x) / sqrt(1 + sigma^2);
    x = (sigma_in z - sigma_in sigma sqrt(1 + sigma^2) v) / (1 + sigma_in sigma^2).
    The weight ``c`` is (1 + sigma^2)^2 / (sigma^2 + 1 / sigma_in)^2, by which the error of x counts 1 + 1 /
    sigma^2; ``v`` is 1.
    """

    def __init__(self, *, weighting: Literal["c", "v"] = "c") -> None:
        self.weighting = weighting

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma, clean)
        return (noise - s * clean) / (1 + s.square()).sqrt()

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma, noisy)
        scale = sigma_in / (1 + sigma_in * s.square())
        return scale * noisy - scale * s * (1 + s.square()).sqrt() * prediction

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        if self.weighting == "v":
            return torch.ones_like(sigma)
        square = sigma.square()
        return ((1 + square) / (square + 1 / sigma_in)).square()


class EffectiveV:
    """Exact v at sigma_eff = sigma_in sigma; every answer counts the same.

    v = (n - sigma_eff x) / sqrt(1 + sigma_eff^2);
    x = sigma_in z / (1 + sigma_eff^2) - sigma_eff / sqrt(1 + sigma_eff^2) v.
    """

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma_in * sigma, clean)
        return (noise - s * clean) / (1 + s.square()).sqrt()

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        s = per_row(sigma_in * sigma, noisy)
        variance = 1 + s.square()
        return sigma_in * noisy / variance - s / variance.sqrt() * prediction

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """See `hpdm_core.diffusion.Objective`."""
        return torch.ones_like(sigma)


@hookimpl
def register_objectives(register: Register) -> None:
    """Add the built-in objectives."""
    register("snap_v", SnapV, source="Snap Video (2402.14797), Table 1; HPDM names only 'v-prediction'")
    register("effective_v", EffectiveV, source="Salimans and Ho (2202.00512), v at the effective noise level")
