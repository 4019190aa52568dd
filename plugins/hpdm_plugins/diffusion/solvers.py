"""Solvers: samplers that denoise the state of a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.solver import Denoise, Noise, integrate, karras_sigmas

__all__ = ["EDM"]


# Defaults for three levels. For a model with fewer levels they are truncated; other lists must not be too long.
_USUAL: dict[str, tuple[Any, ...]] = {
    "steps": (128, 64, 32),
    "sigma_eff_max": (320.0, 80.0, 80.0),
    "sigma_eff_min": (0.008, 0.01, 0.01),
    "order": (2, 1, 1),
    "churn": (40.0, 0.0, 0.0),
}


class EDM:
    """Karras et al. 2022, Algorithm 2: Heun or Euler steps, with or without churn, set separately for each level.

    Options that are lists have one value per level, coarsest first; the last value is used for all finer levels. The
    defaults are those of the HPDM paper where it gives them (steps; 2nd order and noise on level 0 only), and EDM's
    ImageNet values for churn.

    Args:
        sigma_in: input scale per level.
        steps: steps per level, 1 or more.
        sigma_eff_max: noise at the start, in data units (converted by sigma = sigma_eff / sigma_in).
        sigma_eff_min: noise at the last step before 0, in data units.
        rho: a larger value puts more of the steps at low noise; one number for all levels.
        order: 1 for Euler, 2 for Heun.
        churn: strength of the fresh noise, S_churn; 0 for deterministic sampling of a level.
        churn_min: lowest sigma of the process (not sigma_eff) at which noise is added, S_min.
        churn_max: highest such sigma, S_max.
        churn_noise: factor on the standard deviation of the added noise, S_noise.
    """

    def __init__(
        self,
        sigma_in: Sequence[float],
        *,
        steps: tuple[int, ...] = _USUAL["steps"],
        sigma_eff_max: tuple[float, ...] = _USUAL["sigma_eff_max"],
        sigma_eff_min: tuple[float, ...] = _USUAL["sigma_eff_min"],
        rho: float = 7.0,
        order: tuple[int, ...] = _USUAL["order"],
        churn: tuple[float, ...] = _USUAL["churn"],
        churn_min: float = 0.05,
        churn_max: float = 50.0,
        churn_noise: float = 1.003,
    ) -> None:
        self.sigma_in = tuple(sigma_in)
        levels = len(self.sigma_in)

        def per_level(
            name: str, given: tuple[Any, ...], holds: Callable[[Any], bool], allowed: str
        ) -> tuple[Any, ...]:
            usual = _USUAL[name]
            if not given or (len(given) > levels and tuple(given) != usual):
                raise InputError(
                    f"sampling.solver.{name}: {list(given)} has {len(given)} values; allowed is 1 to "
                    f"{levels}, one per level, coarsest first; the last one is used for all finer levels"
                )
            if not all(holds(value) for value in given):
                raise InputError(
                    f"sampling.solver.{name}: {list(given)}; allowed is {allowed} for every level"
                )
            return tuple(given[min(level, len(given) - 1)] for level in range(levels))

        def positive(value: float) -> bool:
            return math.isfinite(value) and value > 0

        self.steps = per_level("steps", steps, lambda value: value >= 1, "a positive integer")
        self.sigma_eff_max = per_level("sigma_eff_max", sigma_eff_max, positive, "a positive number")
        self.sigma_eff_min = per_level("sigma_eff_min", sigma_eff_min, positive, "a positive number")
        self.order = per_level("order", order, lambda value: value in (1, 2), "1 (Euler) or 2 (Heun)")
        self.churn = per_level(
            "churn", churn, lambda value: math.isfinite(value) and value >= 0, "a number of 0 or more"
        )
        for level, (low, high) in enumerate(zip(self.sigma_eff_min, self.sigma_eff_max, strict=True)):
            if low >= high:
                raise InputError(
                    f"sampling.solver.sigma_eff_min: {low:g} on level {level}; allowed is less than "
                    f"sigma_eff_max, which is {high:g} there"
                )
        if not positive(rho):
            raise InputError(f"sampling.solver.rho: {rho:g}; allowed is a positive number")
        if not 0 <= churn_min <= churn_max:
            raise InputError(
                f"sampling.solver.churn_min: {churn_min:g}; allowed is from 0 to churn_max, "
                f"which is {churn_max:g}"
            )
        if not positive(churn_noise):
            raise InputError(f"sampling.solver.churn_noise: {churn_noise:g}; allowed is a positive number")
        self.rho = rho
        self.churn_range = (churn_min, churn_max)
        self.churn_noise = churn_noise

    def sigmas(self, level: int) -> tuple[float, ...]:
        """Return the noise levels (sigma of the process) of ``level``, from the highest to 0."""
        scale = self.sigma_in[level]
        return karras_sigmas(
            self.steps[level], self.sigma_eff_max[level] / scale, self.sigma_eff_min[level] / scale, self.rho
        )

    def calls(self, level: int) -> int:
        """Return the number of denoiser calls on ``level``: one per Euler step, two per Heun step except the last."""
        return int(self.steps[level] * self.order[level] - (self.order[level] - 1))

    def solve(self, level: int, denoise: Denoise, noise: Noise) -> Tensor:
        """Return x [B, C, F, H, W] of ``level`` in data units, starting from ``noise(0)``."""
        return integrate(
            denoise,
            noise,
            sigmas=self.sigmas(level),
            sigma_in=self.sigma_in[level],
            order=self.order[level],
            churn=self.churn[level],
            churn_range=self.churn_range,
            churn_noise=self.churn_noise,
        )


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``edm``."""
    register(
        "edm",
        EDM,
        source="Karras et al. 2022, Algorithm 2; steps and orders of HPDM, section 5.1 and appendix D",
    )
