"""The noise process: how a clean patch is noised and scaled; the interfaces of objectives and noise samplers.

Notation of the paper and of Snap Video (2402.14797): z = x / sigma_in + sigma * n, with x the clean patch in
[-1, 1] (its standard deviation is assumed to be 1), n unit Gaussian noise, sigma_in the input scale of the
level. The noise level in data units is sigma_eff = sigma_in * sigma. The network's input is c_in * z. sigma is
always [B], one number per row.

Pure functions and interfaces; the objectives and noise samplers themselves are plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "NoiseSampler",
    "Objective",
    "Slot",
    "c_in",
    "network_input",
    "noise_clean",
    "per_row",
    "plan",
    "sigma_eff",
]


@dataclass(frozen=True)
class Slot:
    """One entry of the joint pass: its ``level``, and its ``sources``, the slots that it takes context from, coarsest
    first.

    ``stream``: the key of the random stream of its noise; None: its index among the slots. Slots of two samplers with
    the same ``stream`` have the same noise. ``context_only``: the slot is never in the loss; it is run only up to the
    last block before which another slot reads its tokens.
    """

    level: int
    sources: tuple[int, ...] = ()
    stream: tuple[int | str, ...] | None = None
    context_only: bool = False


class NoiseSampler(Protocol):
    """Chooses the entries of a training step and their noise levels."""

    slots: tuple[Slot, ...]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return, for one video, sigma, float32 [S], and whether each of the S slots is in the loss, bool [S]."""
        ...


class Objective(Protocol):
    """The prediction target, the decoder from prediction to clean patch, and the loss weight.

    Target and decoder belong together: do not combine those of two objectives.
    """

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the network's target; all tensors are [B, C, F, H, W] except sigma [B]."""
        ...

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the estimate of the clean patch in data units from z (``noisy``) and the network's prediction."""
        ...

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the weight [B] of the mean squared error of the prediction."""
        ...


def plan(levels: int) -> tuple[Slot, ...]:
    """Return the slots of the paper: one entry per level, with all coarser ones as sources."""
    return tuple(Slot(level=level, sources=tuple(range(level))) for level in range(levels))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` [B] reshaped to broadcast over ``like`` [B, ...] row by row."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def c_in(sigma: Tensor, sigma_in: float) -> Tensor:
    """Return the factor [B] that scales z to unit variance: 1 / sqrt(1 / sigma_in^2 + sigma^2)."""
    return (sigma.square() + sigma_in**-2).rsqrt()


def network_input(z: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
    """Return what the network is given of the state z [B, C, F, H, W]: c_in * z, of unit variance."""
    return per_row(c_in(sigma, sigma_in), z) * z


def sigma_eff(sigma: Tensor, sigma_in: float) -> Tensor:
    """Return the noise level in data units."""
    return sigma_in * sigma


def noise_clean(clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
    """Return z = clean / sigma_in + sigma * noise."""
    return clean / sigma_in + per_row(sigma, noise) * noise
