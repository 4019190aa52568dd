"""Noise scalings (sigma_in per level) and noise samplers (the slots of a training step and their noise levels).

HPDM, section 4 ("corrupted independently"; input scaling "exponentially smaller ... with each increase in
pyramid level"); the distribution is EDM's (2206.00364), ln sigma ~ N(-1.2, 1.2^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hpdm_core.diffusion import Slot, plan
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["CleanParents", "CleanStream", "Independent", "Shared", "constant", "exponential"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def constant(levels: int, *, value: Positive = 4.0) -> tuple[float, ...]:
    """Return the same input scale for all levels."""
    return (value,) * levels


def exponential(levels: int, *, first: Positive = 4.0, ratio: Positive = 2.0) -> tuple[float, ...]:
    """Return sigma_in = first * ratio^level. By default the signal is scaled by 1/4, 1/8, 1/16."""
    return tuple(first * ratio**level for level in range(levels))


class Independent:
    """An independent sigma for every level, ln sigma ~ N(mean, std^2), as in the paper."""

    def __init__(self, sigma_in: Sequence[float], *, mean: float = -1.2, std: Positive = 1.2) -> None:
        self.slots = plan(len(sigma_in))
        self.mean = mean
        self.std = std

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        normal = torch.randn(len(self.slots), generator=generator)
        return (self.mean + self.std * normal).exp(), torch.ones(len(self.slots), dtype=torch.bool)


class Shared(Independent):
    """One sigma for all levels of a video, ln sigma ~ N(mean, std^2): the one that `Independent` draws for level 0."""

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        sigma, in_loss = super().draw(generator)
        return sigma[:1].expand(len(self.slots)).clone(), in_loss


class CleanParents(Independent):
    """`Independent`, but in a ``share`` of the videos all levels below a random target level are as at inference.

    These levels have noise ``context_sigma_eff`` in data units (sigma = context_sigma_eff / sigma_in) and are not in
    the loss. At inference every finer level is sampled with such parents, which independent draws almost never
    produce. The target level is uniform over 1..L-1; with one level this sampler equals `Independent`.
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


class CleanStream:
    """Adds a second set of nearly clean slots, which serve every level as context, like finished parents at inference.

    Slots, for three levels: 0 clean, 0, 1 clean, 1, 2. The clean slots have noise ``context_sigma_eff`` in data units
    and are not in the loss. The others have their own sigma, ln sigma ~ N(mean, std^2), and only clean slots as
    sources. So every level is trained in every step with the parents that it has at inference. There are more block
    calls than with `Independent`: 1.5 times as many with three levels and three blocks.

    At the noise level ``context_sigma_eff`` the network is not trained to denoise, only to make features for other
    levels, and it denoises badly: a solver should not step there (see docs/log.md for measurements).

    ``paired``: the slots in the loss have the sigma and the noise that `Independent` draws for their levels, so that
    the two samplers differ in the parents alone. False gives the random numbers of versions before this option.
    """

    def __init__(
        self,
        sigma_in: Sequence[float],
        *,
        mean: float = -1.2,
        std: Positive = 1.2,
        context_sigma_eff: Positive = 0.05,
        paired: bool = True,
    ) -> None:
        finest = len(sigma_in) - 1
        clean: tuple[int, ...] = ()
        slots: list[Slot] = []
        fixed: list[float] = []
        for level, scale in enumerate(sigma_in):
            sources = clean
            if level < finest:
                clean = (*clean, len(slots))
                slots.append(Slot(level, sources, ("clean", level) if paired else None, context_only=True))
                fixed.append(context_sigma_eff / scale)
            slots.append(Slot(level, sources, (level,) if paired else None))
            fixed.append(0.0)
        self.slots = tuple(slots)
        self.paired = paired
        self.fixed = torch.tensor(fixed)
        self.mean = mean
        self.std = std

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `hpdm_core.diffusion.NoiseSampler`."""
        in_loss = self.fixed == 0
        count = int(in_loss.sum()) if self.paired else len(self.slots)
        drawn = (self.mean + self.std * torch.randn(count, generator=generator)).exp()
        if self.paired:
            return self.fixed.masked_scatter(in_loss, drawn), in_loss
        return torch.where(in_loss, drawn, self.fixed), in_loss


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
    register("clean_stream", CleanStream, source="ours: `clean_parents` for every level in every step")
