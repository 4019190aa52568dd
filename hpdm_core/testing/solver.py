"""Contract of solvers, which denoise the state of one level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpdm_core.base.randomness import normal
from hpdm_core.testing.case import Case, expect, expect_close, leaves_global_rng_alone

if TYPE_CHECKING:
    from hpdm_core.solver import Solver

__all__ = ["SolverCases"]

SHAPE = (2, 3, 4, 6, 10)  # [B, C, F, H, W]
Noise = Callable[[int], Tensor]


def _noise(shape: Sequence[int] = SHAPE) -> Noise:
    return lambda index: normal(shape, 0, "conformance", "solver", index)


class SolverCases(Case):
    """``factory(sigma_in, *, ...) -> Solver`` with ``solve(level, denoise, noise) -> x``."""

    family: ClassVar[str] = "solvers"
    sigma_in: Sequence[float] = (1.0, 2.0, 4.0)
    gaussian_std = 0.5
    gaussian_tolerance = 0.12
    """Allowed relative error of the standard deviation, because first-order solvers with few steps are inexact."""

    def test_constant_denoiser(self) -> None:
        """A denoiser that always returns x* leads to x*, on every level."""
        solver: Solver = self.make(self.sigma_in)
        answer = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for level in range(len(self.sigma_in)):
            made = solver.solve(level, lambda z, sigma: answer, _noise())
            expect_close(made, answer, f"level {level}: result of a constant denoiser", tolerance=1e-3)

    def test_gaussian_denoiser(self) -> None:
        """The exact denoiser of N(0, s^2) leads to samples with standard deviation s, on every level."""
        solver: Solver = self.make(self.sigma_in)
        for level, sigma_in in enumerate(self.sigma_in):

            def exact(z: Tensor, sigma: float, sigma_in: float = sigma_in) -> Tensor:
                variance = self.gaussian_std**2
                return (
                    variance / (variance + (sigma_in * sigma) ** 2) * sigma_in * z
                )  # E[x | z], z = x/sigma_in + ...

            made = solver.solve(level, exact, _noise((8, 3, 8, 16, 16)))
            error = made.std().item() / self.gaussian_std - 1
            what = f"level {level} (sigma_in {sigma_in}): standard deviation {made.std().item():.4f}"
            wanted = f"wanted {self.gaussian_std} to {self.gaussian_tolerance:.0%}"
            expect(
                abs(error) <= self.gaussian_tolerance, f"{what} with the exact Gaussian denoiser, {wanted}"
            )

    def test_calls(self) -> None:
        """denoise always gets a state of the same shape and a positive float; the first state is sigma * noise(0)."""
        solver: Solver = self.make(self.sigma_in)
        for level in range(len(self.sigma_in)):
            calls: list[tuple[Tensor, float]] = []

            def spy(z: Tensor, sigma: float, calls: list[tuple[Tensor, float]] = calls) -> Tensor:
                calls.append((z.clone(), sigma))
                return torch.zeros_like(z)

            made = solver.solve(level, spy, _noise())
            expect(made.shape == SHAPE, f"level {level}: result {list(made.shape)}, wanted {list(SHAPE)}")
            expect(bool(torch.isfinite(made).all()), f"level {level}: the result is not finite")
            expect(bool(calls), f"level {level}: denoise is never called")
            told = solver.calls(level)
            expect(
                told == len(calls),
                f"level {level}: calls() says {told}, denoise was called {len(calls)} times",
            )
            for z, sigma in calls:
                expect(isinstance(sigma, float), f"sigma: {type(sigma).__name__}, wanted float")
                expect(math.isfinite(sigma) and sigma > 0, f"sigma: {sigma}, wanted a finite number above 0")
                expect(z.shape == SHAPE, f"state: {list(z.shape)}, wanted {list(SHAPE)}")
            z, sigma = calls[0]
            spread = z.double().std().item() / sigma
            expect(
                abs(spread - 1) < 0.2, f"level {level}: the first state is {spread:.2f} sigma wide, wanted 1"
            )
            expect(calls[-1][1] < calls[0][1], f"level {level}: sigma does not fall")

    def test_noise_indices(self) -> None:
        """noise(0) is used first, then others in increasing order, each once, independent of the denoiser's output."""
        solver: Solver = self.make(self.sigma_in)
        for level in range(len(self.sigma_in)):
            asked: list[list[int]] = []
            for answer in (0.0, 0.7):
                indices: list[int] = []

                def spy(index: int, indices: list[int] = indices) -> Tensor:
                    indices.append(index)
                    return _noise()(index)

                def denoise(z: Tensor, sigma: float, answer: float = answer) -> Tensor:
                    return torch.full_like(z, answer)

                solver.solve(level, denoise, spy)
                asked.append(indices)
            expect(
                asked[0][:1] == [0], f"level {level}: the first noise asked for is {asked[0][:1]}, wanted [0]"
            )
            rising = asked[0] == sorted(set(asked[0]))
            expect(
                rising, f"level {level}: noise asked for in the order {asked[0]}, wanted rising and each once"
            )
            expect(asked[1] == asked[0], f"level {level}: which noise is asked for depends on the denoiser")

    def test_keyed(self) -> None:
        """All randomness is noise(i): solving twice gives bitwise equal results, and row i depends on row i only."""
        solver, other = self.make(self.sigma_in, seed=0), self.make(self.sigma_in, seed=1)

        def squash(z: Tensor, sigma: float) -> Tensor:
            return torch.tanh(z / (1 + sigma))

        for level in range(len(self.sigma_in)):
            first = solver.solve(level, squash, _noise())
            with leaves_global_rng_alone("solve"):
                second = other.solve(level, squash, _noise())
            expect(torch.equal(first, second), f"level {level}: solved twice, the result differs")
            alone = solver.solve(level, squash, lambda index: _noise()(index)[1:])
            expect_close(alone, first[1:], f"level {level}: row 1 solved alone", tolerance=1e-5)
