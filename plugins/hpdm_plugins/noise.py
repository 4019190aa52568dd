"""Noise scalings (sigma_in per level) and noise samplers (the plan of a training step and its noise levels).

HPDM, section 4 ("corrupted independently"; input scaling "exponentially smaller ... with each increase in
pyramid level"); the distribution is EDM's (2206.00364), ln sigma ~ N(-1.2, 1.2^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hpdm_core.diffusion import plan
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["CleanParents", "Independent", "Shared", "constant", "exponential"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def constant(levels: int, *, value: Positive = 4.0) -> tuple[float, ...]:
    """One input scale for all levels."""
    return (value,) * levels


def exponential(levels: int, *, first: Positive = 4.0, ratio: Positive = 2.0) -> tuple[float, ...]:
    """Return sigma_in = first * ratio^level: the signal is scaled by 1/4, 1/8, 1/16 by default."""
    return tuple(first * ratio**level for level in range(levels))


class Independent:
    """Every level its own sigma, ln sigma ~ N(mean, std^2): the paper's recipe."""

    def __init__(self, sigma_in: Sequence[float], *, mean: float = -1.2, std: Positive = 1.2) -> None:
        self.slots = plan(len(sigma_in))
        self.mean = mean
        self.std = std

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        normal = torch.randn(len(self.slots), generator=generator)
        return (self.mean + self.std * normal).exp(), torch.ones(len(self.slots), dtype=torch.bool)


class Shared(Independent):
    """One sigma for all levels of a video, ln sigma ~ N(mean, std^2): level 0's draw under `Independent`."""

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        sigma, in_loss = super().draw(generator)
        return sigma[:1].expand(len(self.slots)).clone(), in_loss


class CleanParents(Independent):
    """`Independent`, but in a share of the videos all levels below a random target stand as at inference.

    There their noise is ``context_sigma_eff`` in data units (sigma = context_sigma_eff / sigma_in) and they
    are not in the loss. Independent draws almost never train this condition, under which every finer level is
    sampled. The target is uniform over levels 1..L-1; with one level nothing changes.
    """

    def __init__(
        self,
        sigma_in: Sequence[float],
        *,
        mean: float = -1.2,
        std: Positive = 1.2,
        share: Share = 0.25,
        context_sigma_eff: Positive = 0.05,
    ) -> None:
        super().__init__(sigma_in, mean=mean, std=std)
        self.share = share
        self.clean = torch.tensor([context_sigma_eff / scale for scale in sigma_in])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        sigma, in_loss = super().draw(generator)
        levels = len(self.slots)
        if levels > 1 and float(torch.rand((), generator=generator)) < self.share:
            target = int(torch.randint(1, levels, (), generator=generator))
            sigma[:target] = self.clean[:target]
            in_loss[:target] = False
        return sigma, in_loss


@hookimpl
def register_noise_scalings(register: Register) -> None:
    """Add the built-in noise scalings."""
    register("constant", constant, source="Snap Video, sigma_in = sqrt(frames)")
    register("exponential", exponential, source="HPDM, section 4, input scaling; base and ratio are ours")


@hookimpl
def register_noise_samplers(register: Register) -> None:
    """Add the built-in noise samplers."""
    register("independent", Independent, source="HPDM, section 4; EDM, Table 1")
    register("shared", Shared, source="ours: the counterpart of HPDM's independent noise")
    register(
        "clean_parents", CleanParents, source="ours: trains the condition of cached inference (HPDM, 4.4)"
    )
