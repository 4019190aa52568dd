"""The held-out loss: how well a model denoises real patches that it was not trained on, in units common to all arms.

It is the mean squared error of the denoised estimate against the clean patch, in data units ([-1, 1]) and not in those
of a training loss, at fixed noise levels sigma_eff = sigma_in * sigma, on every level, once with clean parents (as in
sampling) and once with noisy ones. Patches and noise are the same for every arm and seed, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import reduce
from torch import Tensor

from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator, normal
from hpdm_core.diffusion import noise_clean
from hpdm_core.pyramid import level_patch

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row
    from hpdm_core.pyramid import Coords, Pyramid, Triple

__all__ = ["PARENTS", "SIGMAS", "HeldOutLoss"]

SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Noise levels of the patch, sigma_eff."""
PARENTS = {"clean": 0.05, "noisy": 1.0}
"""Noise levels of the parents, sigma_eff."""
_STREAM = "held_out_loss"
_ROWS = 16  # patches per batch


@dataclass(frozen=True)
class _Patches:
    """Nested patches of a batch of clips: clean [B, C, f, h, w] and coordinates per level, with numbers and labels."""

    numbers: range
    clean: list[Tensor]
    coords: list[Coords]
    label: Tensor

    def noise(self, *key: int | str) -> Tensor:
        shape = self.clean[0].shape[1:]
        drawn = [normal(shape, _STREAM, number, *key) for number in self.numbers]
        return torch.stack(drawn).to(self.label.device)


class HeldOutLoss:
    """The metric ``held_out_loss`` over ``patches`` nested chains of patches of ``split``.

    ``self_conditioning``: each estimate comes from the second of two passes at the same noise; the second starts from
    the latents of the first, and the first from zero latents. Training does this with most videos, and sampling starts
    similarly from the latents of its previous step. False: one pass, which is also used for models without latents,
    where a second pass would give the same.
    """

    name = "held_out_loss"
    needs: Need = "model"

    def __init__(
        self,
        *,
        patches: int,
        split: Literal["held_out", "train"],
        sigmas: Sequence[float],
        self_conditioning: bool,
    ) -> None:
        if patches < 1 or not sigmas or min(sigmas) <= 0:
            raise InputError(
                f"metric held_out_loss: patches={patches}, sigmas={list(sigmas)}; allowed are one or more "
                "patches, and one or more sigmas above 0"
            )
        self.patches = patches
        self.split = split
        self.sigmas = tuple(sigmas)
        self.self_conditioning = self_conditioning

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the noise levels, the choice of patches, and how the model is called."""
        return {
            "metric": self.name,
            "measure": "mean squared error of the denoised estimate, data units [-1, 1], EMA weights",
            "patches": self.patches,
            "split": self.split,
            "sigma_eff": list(self.sigmas),
            "parents_sigma_eff": PARENTS,
            "passes": 2 if self.self_conditioning else 1,
            "labels": "the clips' own",
            "downsampling": assembly.config.data.downsampling,
        }

    @torch.no_grad()
    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return rows per (parents, level, sigma_eff), and their mean over sigma_eff with ``sigma_eff`` None.

        Level 0 has no parents: it is computed once and listed under both kinds of parents. The errors of the single
        patches go into ``context.details``: per kind of parents and level, a list over patches of lists over sigma_eff.
        Patches are the same for all arms and seeds.
        """
        levels = context.assembly.config.model.levels
        each: dict[tuple[str, int], list[Tensor]] = {
            (kind, level): [] for kind in PARENTS for level in range(levels)
        }
        batches = [range(start, min(start + _ROWS, self.patches)) for start in range(0, self.patches, _ROWS)]
        for found in distributed.spread(batches, lambda numbers: self._batch_errors(context, numbers)):
            for key, errors in found.items():
                each[key].append(errors)
        context.details["sigma_eff"] = list(self.sigmas)
        context.details["errors"] = [
            {"parents": kind, "level": level, "patches": _in_json(torch.cat(errors, dim=1).T)}
            for (kind, level), errors in each.items()
        ]
        rows: list[Row] = []
        for (kind, level), parts in each.items():
            total = torch.zeros(len(self.sigmas), dtype=torch.float64)
            for errors in parts:
                total += torch.stack([row.sum() for row in errors])
            means = (total / self.patches).tolist()
            pairs = [(None, sum(means) / len(means)), *zip(self.sigmas, means, strict=True)]
            rows += [
                {"metric": self.name, "level": level, "value": value, "parents": kind, "sigma_eff": sigma_eff}
                for sigma_eff, value in pairs
            ]
        return rows

    def _batch_errors(self, context: EvaluationContext, numbers: range) -> dict[tuple[str, int], Tensor]:
        """Return the errors [K, n] of the patches ``numbers``, per kind of parents and level."""
        patches = self._draw(context, numbers)
        first = self._errors(context, patches, level=0, contexts=None)
        found = {}
        for kind, sigma_eff in PARENTS.items():
            found[kind, 0] = first
            sources: list[Any] = []
            for level in range(1, context.assembly.config.model.levels):
                sources.append(self._encode(context, patches, level - 1, sigma_eff, sources))
                contexts = context.denoiser.contexts(level, patches.coords[level], sources)
                found[kind, level] = self._errors(context, patches, level=level, contexts=contexts)
        return found

    def _draw(self, context: EvaluationContext, numbers: range) -> _Patches:
        assembly = context.assembly
        pyramid, mode = assembly.pyramid, assembly.config.data.downsampling
        clean: list[list[Tensor]] = [[] for _ in range(pyramid.levels)]
        offsets: list[list[Triple]] = [[] for _ in range(pyramid.levels)]
        labels = []
        for number in numbers:
            clip = context.clip(_STREAM, self.split, number)
            labels.append(clip.label if assembly.config.model.classes else -1)
            for level, offset in enumerate(_nested(pyramid, number)):
                clean[level].append(level_patch(clip.pixels, pyramid, level, offset, mode))
                offsets[level].append(offset)
        coords = [
            pyramid.coords(level, torch.tensor(starts), downsampling=mode).to(context.device)
            for level, starts in enumerate(offsets)
        ]
        return _Patches(
            numbers=numbers,
            clean=[torch.stack(patches).to(context.device) for patches in clean],
            coords=coords,
            label=torch.tensor(labels, device=context.device),
        )

    def _encode(
        self,
        context: EvaluationContext,
        patches: _Patches,
        level: int,
        sigma_eff: float,
        sources: Sequence[Any],
    ) -> Any:
        sigma_in = context.denoiser.sigma_in[level]
        sigma = torch.full((len(patches.numbers),), sigma_eff / sigma_in, device=context.device)
        z = noise_clean(patches.clean[level], patches.noise("parent", level), sigma, sigma_in)
        return context.denoiser.encode(level, z, sigma, patches.coords[level], patches.label, sources)

    def _errors(self, context: EvaluationContext, patches: _Patches, *, level: int, contexts: Any) -> Tensor:
        """Return the mean squared error of each of n patches at each of K sigma_eff: [K, n], float64."""
        clean, coords = patches.clean[level], patches.coords[level]
        sigma_in = context.denoiser.sigma_in[level]
        errors = []
        for index, sigma_eff in enumerate(self.sigmas):
            sigma = torch.full((len(clean),), sigma_eff / sigma_in, device=context.device)
            z = noise_clean(clean, patches.noise("patch", level, index), sigma, sigma_in)
            latents = None
            for _ in range(2 if self.self_conditioning else 1):
                denoised, latents = context.denoiser(
                    level, z, sigma, coords, patches.label, contexts, latents
                )
                if latents is None:
                    break
            squared = (denoised.double() - clean.double()).square()
            errors.append(reduce(squared, "b c f h w -> b", "mean"))
        return torch.stack(errors).cpu()


def _in_json(errors: Tensor) -> list[list[float | None]]:
    """Return a matrix as lists, with None for values that are not finite, which JSON cannot hold."""
    return [[value if math.isfinite(value) else None for value in row] for row in errors.tolist()]


def _nested(pyramid: Pyramid, number: int) -> tuple[Triple, ...]:
    """Return the offsets of patch ``number`` on all levels: uniform on the finest, parents chosen as in sampling."""
    drawn = generator(_STREAM, number, "offset")
    finest = pyramid.levels - 1
    f, h, w = (
        int(torch.randint(size - patch + 1, (), generator=drawn))
        for size, patch in zip(pyramid.size(finest), pyramid.patch, strict=True)
    )
    return (*pyramid.chain(finest, (f, h, w)), (f, h, w))
