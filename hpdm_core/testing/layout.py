"""Contracts of computation allocations and coordinate samplers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

import torch

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.pyramid import Pyramid
from hpdm_core.testing.case import Case, expect, leaves_global_rng_alone

if TYPE_CHECKING:
    from hpdm_core.pyramid import CoordinateSampler

__all__ = ["ComputationAllocationCases", "CoordinateSamplerCases"]


class ComputationAllocationCases(Case):
    """``factory(blocks, levels, *, ...) -> Sequence[int]``: how many levels each block runs."""

    family: ClassVar[str] = "computation_allocations"
    shape: tuple[int, int] = (6, 3)
    """Numbers of blocks and levels that must work with the given options; others may raise InputError."""

    def _expect_allocation(self, blocks: int, levels: int) -> None:
        made = list(self.make(blocks, levels))
        what = f"{blocks} blocks, {levels} levels: {made}"
        expect(all(isinstance(count, int) for count in made), f"{what}: wanted integers")
        expect(len(made) == blocks, f"{what}: wanted one number per block")
        expect(all(1 <= count <= levels for count in made), f"{what}: wanted numbers from 1 to {levels}")
        expect(
            made == sorted(made), f"{what}: a level that has entered never leaves, so numbers must not fall"
        )
        expect(made[-1] == levels, f"{what}: the last block must run every level")

    def test_allocation_is_valid(self) -> None:
        """The first block runs at least 1 level, the numbers never decrease, the last block runs all levels."""
        self._expect_allocation(*self.shape)

    def test_other_shapes(self) -> None:
        """Any number of blocks and levels gives a valid allocation or raises InputError."""
        if self.options:
            return  # options may be valid for one number of blocks only
        for blocks, levels in ((1, 1), (4, 1), (2, 2), (4, 4), (6, 4), (1, 3)):
            with contextlib.suppress(InputError):
                self._expect_allocation(blocks, levels)

    def test_deterministic(self) -> None:
        """Built twice with different global random states, it is the same."""
        first, second = (list(self.make(*self.shape, seed=seed)) for seed in (0, 1))
        expect(first == second, f"made twice, it differs: {first} and {second}")


class CoordinateSamplerCases(Case):
    """``factory(pyramid, *, ...) -> CoordinateSampler``: draws the positions of training patches."""

    family: ClassVar[str] = "coordinate_samplers"
    draws = 64

    @staticmethod
    def pyramids() -> list[Pyramid]:
        """Return pyramids with different sizes per axis: 3 levels, 3 levels with one fixed axis, and a single level."""
        return [
            Pyramid(video=(8, 24, 40), patch=(2, 6, 10), token=(1, 3, 5), levels=3),
            Pyramid(video=(4, 24, 54), patch=(4, 6, 6), token=(1, 2, 3), levels=3),
            Pyramid(video=(4, 6, 10), patch=(4, 6, 10), token=(2, 3, 5), levels=1),
        ]

    def test_integers_on_the_lattice(self) -> None:
        """Offsets are int64 [L, 3], in each level's own pixels, and patches lie inside the level's video."""
        for pyramid in self.pyramids():
            sampler: CoordinateSampler = self.make(pyramid)
            for video in range(self.draws):
                offsets = sampler.sample(generator(0, "offsets", video))
                expect(offsets.dtype == torch.int64, f"offsets: {offsets.dtype}, wanted int64")
                shape = (pyramid.levels, 3)
                expect(offsets.shape == shape, f"offsets: shape {list(offsets.shape)}, wanted {list(shape)}")
                for level in range(pyramid.levels):
                    for axis in range(3):
                        most = pyramid.size(level)[axis] - pyramid.patch[axis]
                        given = int(offsets[level, axis])
                        what = f"level {level}, axis {'fhw'[axis]}: offset {given}"
                        expect(0 <= given <= most, f"{what}, allowed 0 to {most}")

    def test_nested(self) -> None:
        """Every patch lies inside the patch of the next coarser level."""
        for pyramid in self.pyramids():
            sampler: CoordinateSampler = self.make(pyramid)
            for video in range(self.draws):
                offsets = sampler.sample(generator(1, "offsets", video)).tolist()
                for level in range(1, pyramid.levels):
                    for axis in range(3):
                        spans = []  # start and end in full-resolution pixels: the parent's, the child's
                        for each in (level - 1, level):
                            pitch = pyramid.pitch(each)[axis]
                            start = offsets[each][axis] * pitch
                            spans.append((start, start + pyramid.patch[axis] * pitch))
                        (low, high), (start, end) = spans
                        what = f"level {level}, axis {'fhw'[axis]}: patch {start}..{end} in full pixels"
                        expect(low <= start and end <= high, f"{what} leaves its parent's {low}..{high}")

    def test_reaches_more_than_one_place(self) -> None:
        """Over many draws the finest patch has more than one position on every axis where it can move."""
        pyramid = self.pyramids()[0]
        sampler: CoordinateSampler = self.make(pyramid)
        finest = torch.stack([sampler.sample(generator(2, "offsets", i))[-1] for i in range(self.draws)])
        for axis in range(3):
            expect(
                len(set(finest[:, axis].tolist())) > 1,
                f"axis {'fhw'[axis]}: always offset {int(finest[0, axis])}",
            )

    def test_keyed(self) -> None:
        """A draw depends on the given generator alone, and does not use torch's global generator."""
        pyramid = self.pyramids()[0]
        sampler, other = self.make(pyramid, seed=0), self.make(pyramid, seed=1)
        first = sampler.sample(generator(0, "offsets", 0))
        with leaves_global_rng_alone("sample"):
            sampler.sample(generator(0, "offsets", 1))
            again = other.sample(generator(0, "offsets", 0))
        same = torch.equal(first, again)
        expect(same, "sample: the same generator gives other offsets; keep no state and draw from it alone")
