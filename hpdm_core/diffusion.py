"""The noise process: how a clean patch is noised and scaled, and what an objective and a noise sampler are.

Notation of the paper and of Snap Video (2402.14797): z = x / sigma_in + sigma * n, with x the clean patch in
[-1, 1] (its standard deviation taken as 1), n unit Gaussian noise, sigma_in the input scale of the level. The
noise in data units is sigma_eff = sigma_in * sigma. The network sees c_in * z. sigma is always [B], one
number per row.

Pure functions and interfaces; the objectives and samplers themselves are plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["NoiseSampler", "Objective", "Slot", "c_in", "noise_clean", "per_row", "plan", "sigma_eff"]


@dataclass(frozen=True)
class Slot:
    """One entry of the joint pass: its level, and the slots that feed it, coarsest first.

    ``stream``: the name of the random stream of its noise; None: its number among the slots. Slots of two samplers that
    have one name have the same noise. ``context_only``: it is in no loss, in any draw, and is computed no further than
    those that it feeds read it.
    """

    level: int
    sources: tuple[int, ...] = ()
    stream: tuple[int | str, ...] | None = None
    context_only: bool = False


class NoiseSampler(Protocol):
    """Which entries a training step has, and how noisy each is."""

    slots: tuple[Slot, ...]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return for one video sigma, float32 [S], and whether each slot counts in the loss, bool [S]."""
        ...


class Objective(Protocol):
    """What the network is asked for, how the answer is read, and how its error is weighted.

    Target and decoder belong together and are never mixed between objectives.
    """

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return what the network should answer; all [B, C, F, H, W] but sigma [B]."""
        ...

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the estimate of the clean patch in data units from z and the network's answer."""
        ...

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the weight [B] of the mean squared error of the answer."""
        ...


def plan(levels: int) -> tuple[Slot, ...]:
    """Return the slots of the paper: one entry per level, each fed by all coarser ones."""
    return tuple(Slot(level=level, sources=tuple(range(level))) for level in range(levels))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` [B] shaped so that it multiplies ``like`` [B, ...] row by row."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def c_in(sigma: Tensor, sigma_in: float) -> Tensor:
    """Return the factor [B] that brings z to unit variance: 1 / sqrt(1 / sigma_in^2 + sigma^2)."""
    return (sigma.square() + sigma_in**-2).rsqrt()


def sigma_eff(sigma: Tensor, sigma_in: float) -> Tensor:
    """Return the noise level in data units."""
    return sigma_in * sigma


def noise_clean(clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
    """Return z = clean / sigma_in + sigma * noise."""
    return clean / sigma_in + per_row(sigma, noise) * noise
