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

from hpdm_core.diffusion import Slot, plan
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["CleanParents", "CleanStream", "Independent", "Shared", "constant", "exponential"]

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


class CleanStream:
    """A second stream of nearly clean patches feeds every level, as finished parents do at inference.

    Slots, for three levels: 0 clean, 0, 1 clean, 1, 2. The clean ones stand at ``context_sigma_eff`` in data
    units and are in no loss; the others have their own sigma, ln sigma ~ N(mean, std^2), and are fed by the
    clean ones alone. Costs more block calls than `Independent`, 1.5 times as many with three levels and three blocks,
    and trains every level in every step under the condition it is sampled in.

    At ``context_sigma_eff`` itself the network learns features for other levels, and denoises badly: a solver should
    not step there (docs/log.md has figures).

    ``paired``: the slots in the loss have the sigma and the noise that `Independent` draws for their levels: the
    two differ in their parents alone. Without it the numbers are those of versions before this option.
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
