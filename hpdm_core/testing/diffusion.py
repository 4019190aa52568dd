"""Contracts of noise scalings, noise samplers and objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpdm_core.base.randomness import generator
from hpdm_core.testing.case import Case, expect, expect_close, leaves_global_rng_alone

if TYPE_CHECKING:
    from hpdm_core.diffusion import NoiseSampler, Objective

__all__ = ["NoiseSamplerCases", "NoiseScalingCases", "ObjectiveCases"]

SIGMA_INS: tuple[tuple[float, ...], ...] = ((1.0,), (1.0, 2.0, 4.0), (4.0, 8.0, 16.0, 32.0))
"""Input scales of pyramids of 1, 3 and 4 levels."""


class NoiseScalingCases(Case):
    """``factory(levels, *, ...) -> Sequence[float]``: sigma_in per level."""

    family: ClassVar[str] = "noise_scalings"

    def test_one_positive_number_per_level(self) -> None:
        """For 1 to 4 levels: one finite positive number per level (3 levels must work, others may raise InputError)."""
        for levels in (3, 1, 2, 4):
            made = self.make(levels) if levels == 3 else self.make_or_skip(levels)
            values = [float(value) for value in made]
            expect(len(values) == levels, f"{levels} levels: {len(values)} numbers: {values}")
            allowed = all(math.isfinite(value) and value > 0 for value in values)
            expect(allowed, f"{levels} levels: {values}, wanted finite numbers above 0")

    def test_deterministic(self) -> None:
        """Built twice with different global random states, it gives the same numbers."""
        expect(list(self.make(3, seed=0)) == list(self.make(3, seed=1)), "made twice, the numbers differ")


class NoiseSamplerCases(Case):
    """``factory(sigma_in, *, ...) -> NoiseSampler``: the slots of the joint pass and their sigmas."""

    family: ClassVar[str] = "noise_samplers"
    draws = 64
    """Videos drawn per check."""

    def _samplers(self) -> list[tuple[int, NoiseSampler]]:
        return [(len(sigma_in), self.make(sigma_in)) for sigma_in in SIGMA_INS]

    def test_slots_are_valid(self) -> None:
        """Each level has a slot; a slot's sources are earlier slots, one per coarser level, coarsest first."""
        for levels, sampler in self._samplers():
            slots = sampler.slots
            expect(isinstance(slots, tuple), f"slots: {type(slots).__name__}, wanted a tuple of Slot")
            found = {slot.level for slot in slots}
            expect(found == set(range(levels)), f"slots hold levels {sorted(found)}, wanted 0..{levels - 1}")
            for index, slot in enumerate(slots):
                what = f"slot {index} (level {slot.level}) has sources {slot.sources}"
                expect(all(0 <= source < index for source in slot.sources), f"{what}: not earlier slots")
                coarser = [slots[source].level for source in slot.sources]
                wanted = list(range(slot.level))
                expect(
                    coarser == wanted, f"{what} of levels {coarser}, wanted levels {wanted}, coarsest first"
                )

    def test_sigma_is_positive(self) -> None:
        """sigma [S] has a floating-point dtype and is finite and above 0 in every draw."""
        for _, sampler in self._samplers():
            for video in range(self.draws):
                sigma, _ = sampler.draw(generator(0, "sigma", video))
                slots = len(sampler.slots)
                expect(sigma.shape == (slots,), f"sigma: shape {list(sigma.shape)}, wanted [{slots}]")
                expect(sigma.is_floating_point(), f"sigma: {sigma.dtype}, wanted a floating type")
                allowed = bool((torch.isfinite(sigma) & (sigma > 0)).all())
                expect(allowed, f"sigma: {sigma.tolist()}, wanted finite numbers above 0")

    def test_in_loss_is_boolean(self) -> None:
        """in_loss [S] is boolean, and over many videos every level is in the loss."""
        for levels, sampler in self._samplers():
            trained: set[int] = set()
            for video in range(self.draws):
                _, in_loss = sampler.draw(generator(0, "sigma", video))
                slots = sampler.slots
                expect(in_loss.dtype == torch.bool, f"in_loss: {in_loss.dtype}, wanted torch.bool")
                expect(
                    in_loss.shape == (len(slots),),
                    f"in_loss: shape {list(in_loss.shape)}, wanted [{len(slots)}]",
                )
                expect(bool(in_loss.any()), "in_loss: a video in which nothing is trained")
                wrong = [number for number, slot in enumerate(slots) if slot.context_only and in_loss[number]]
                expect(not wrong, f"in_loss: slots {wrong}, which are context_only")
                trained |= {slot.level for slot, kept in zip(slots, in_loss.tolist(), strict=True) if kept}
            missing = sorted(set(range(levels)) - trained)
            expect(not missing, f"in_loss: levels {missing} are never trained in {self.draws} videos")

    def test_keyed(self) -> None:
        """A draw depends on the given generator alone, and does not use torch's global generator."""
        for sigma_in in SIGMA_INS:
            sampler, other = self.make(sigma_in, seed=0), self.make(sigma_in, seed=1)
            first = sampler.draw(generator(0, "sigma", 0))
            with leaves_global_rng_alone("draw"):
                for video in range(1, 4):
                    moved = sampler.draw(generator(0, "sigma", video))
                    expect(
                        not torch.equal(moved[0], first[0]), "draw: another generator gives the same sigmas"
                    )
                again = other.draw(generator(0, "sigma", 0))
            same = torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
            expect(same, "draw: the same generator gives other values; keep no state and draw from it alone")


class ObjectiveCases(Case):
    """``factory(*, ...) -> Objective``: target, decoder and loss weight."""

    family: ClassVar[str] = "objectives"
    sigmas: Sequence[float] = (0.002, 0.03, 0.3, 1.0, 5.0, 80.0)
    sigma_ins: Sequence[float] = (0.5, 1.0, 4.0, 16.0)

    def _draw(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        stream = generator(0, "objective")
        shape = (len(self.sigmas), 3, 2, 4, 5)  # [B, C, F, H, W], all different
        clean = torch.rand(shape, generator=stream, dtype=dtype) * 2 - 1
        noise = torch.randn(shape, generator=stream, dtype=dtype)
        return clean, noise, torch.tensor(self.sigmas, dtype=dtype)

    def test_perfect_prediction_decodes_to_clean(self) -> None:
        """With prediction = target, the decoder returns the clean patch to 1e-6, in double precision."""
        objective: Objective = self.make()
        clean, noise, sigma = self._draw()
        for sigma_in in self.sigma_ins:
            noisy = (
                clean / sigma_in + sigma.view(-1, 1, 1, 1, 1) * noise
            )  # z, paper: input scaling b = 1/sigma_in
            target = objective.target(clean, noise, sigma, sigma_in)
            expect(bool(torch.isfinite(target).all()), f"target: not finite at sigma_in {sigma_in}")
            decoded = objective.denoised(noisy, target, sigma, sigma_in)
            what = f"denoised of a perfect prediction, sigma_in {sigma_in}, sigma {list(self.sigmas)}"
            expect_close(decoded, clean, what, tolerance=1e-6)

    def test_weight_is_positive(self) -> None:
        """The loss weight of each row is finite and above 0."""
        objective: Objective = self.make()
        _, _, sigma = self._draw()
        for sigma_in in self.sigma_ins:
            weight = objective.weight(sigma, sigma_in)
            expect(
                weight.shape == sigma.shape, f"weight: shape {list(weight.shape)}, wanted {list(sigma.shape)}"
            )
            allowed = bool((torch.isfinite(weight) & (weight > 0)).all())
            expect(
                allowed, f"weight: {weight.tolist()} at sigma_in {sigma_in}, wanted finite numbers above 0"
            )

    def test_loss_identity(self) -> None:
        """weight * mean|F - v|^2 equals lambda(sigma) * mean|D - x|^2 for every error, with lambda positive.

        This holds if the decoder D is affine in the prediction F, with one slope per row. Then losses of levels can
        be compared in data units.
        """
        objective: Objective = self.make()
        clean, noise, sigma = self._draw()
        for sigma_in in self.sigma_ins:
            noisy = clean / sigma_in + sigma.view(-1, 1, 1, 1, 1) * noise
            target = objective.target(clean, noise, sigma, sigma_in)
            weight = objective.weight(sigma, sigma_in)
            slopes = []
            for seed in (1, 2):
                error = torch.randn(clean.shape, generator=generator(seed, "error"), dtype=clean.dtype)
                moved = objective.denoised(noisy, target + error, sigma, sigma_in) - clean
                slopes.append(weight * error.square().mean((1, 2, 3, 4)) / moved.square().mean((1, 2, 3, 4)))
            allowed = bool((torch.isfinite(slopes[0]) & (slopes[0] > 0)).all())
            expect(
                allowed, f"lambda: {slopes[0].tolist()} at sigma_in {sigma_in}, wanted finite numbers above 0"
            )
            difference = float((slopes[1] / slopes[0] - 1).abs().max())
            expect(
                difference < 1e-4,
                f"lambda depends on the error, by {difference:.2g} at sigma_in {sigma_in}: the decoder must "
                "be affine in the prediction, with one slope per row",
            )

    def test_rows_and_types(self) -> None:
        """Shapes and dtype are preserved, and row i depends on row i only."""
        objective: Objective = self.make()
        clean, noise, sigma = self._draw(torch.float32)
        noisy = clean / 4 + sigma.view(-1, 1, 1, 1, 1) * noise
        target = objective.target(clean, noise, sigma, 4.0)
        decoded = objective.denoised(noisy, target, sigma, 4.0)
        for name, made in (("target", target), ("denoised", decoded)):
            expect(made.dtype == torch.float32, f"{name}: {made.dtype} of float32 inputs")
            expect(made.shape == clean.shape, f"{name}: shape {list(made.shape)}, wanted {list(clean.shape)}")
        for row in range(len(sigma)):
            one = slice(row, row + 1)
            alone = objective.target(clean[one], noise[one], sigma[one], 4.0)
            expect_close(alone, target[one], f"target of row {row} alone", tolerance=1e-6)
            alone = objective.denoised(noisy[one], target[one], sigma[one], 4.0)
            expect_close(alone, decoded[one], f"denoised of row {row} alone", tolerance=1e-6)
            alone = objective.weight(sigma[one], 4.0)
            expect_close(
                alone, objective.weight(sigma, 4.0)[one], f"weight of row {row} alone", tolerance=1e-6
            )
