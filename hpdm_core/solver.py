"""EDM's sampler: its noise levels, and the integration of one state from pure noise to data.

Karras et al. 2022, Algorithm 2, with input scaling: the state is z = x / sigma_in + sigma * noise, and the
denoiser returns x in data units, so that dz/dsigma = (z - denoised / sigma_in) / sigma. This module does not
depend on tiles, parents or networks: a level of the pyramid is one state with one denoiser.

Shapes: z and x are [B, C, F, H, W]; sigma is one number for the whole state (the noise level of the process;
in data units it is sigma_eff = sigma_in * sigma).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Denoise", "Noise", "Solver", "integrate", "karras_sigmas"]

Denoise = Callable[[Tensor, float], Tensor]
"""``denoise(z, sigma)``: the estimate of the clean x, in data units, with the shape of z."""

Noise = Callable[[int], Tensor]
"""``noise(i)``: the i-th field of unit Gaussian noise of this level; each call returns the same field."""


class Solver(Protocol):
    """Denoises one level at a time (`sampling.solver`)."""

    def solve(self, level: int, denoise: Denoise, noise: Noise) -> Tensor:
        """Return x [B, C, F, H, W] in data units, not clipped. The initial state is made from ``noise(0)``.

        ``denoise`` may keep state between calls (latents), so call it in the order of the noise levels, once
        per evaluation.
        """

    def calls(self, level: int) -> int:
        """Return how many times ``solve`` calls ``denoise`` on ``level``."""


def karras_sigmas(steps: int, sigma_max: float, sigma_min: float, rho: float) -> tuple[float, ...]:
    """Return ``steps`` noise levels from sigma_max down to sigma_min, and a final 0.

    Karras et al. 2022, Eq. 5. A single step goes from sigma_max to 0.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    span = max(steps - 1, 1)
    return (*(float((high + i / span * (low - high)) ** rho) for i in range(steps)), 0.0)


def integrate(
    denoise: Denoise,
    noise: Noise,
    *,
    sigmas: Sequence[float],
    sigma_in: float,
    order: int,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> Tensor:
    """Integrate from sigmas[0], with the state sigmas[0] * ``noise(0)``, to sigmas[-1] == 0; return x = sigma_in * z.

    Euler steps for ``order`` 1, Heun steps for 2 (the last step, to sigma 0, is always an Euler step). With
    ``churn`` > 0, fresh noise is added before each step whose sigma lies in ``churn_range`` (both ends
    included): gamma = min(churn / steps, sqrt(2) - 1), its standard deviation multiplied by ``churn_noise``.
    Step i uses ``noise(i + 1)``, and only if it adds noise.
    """
    steps = len(sigmas) - 1
    state = noise(0) * sigmas[0]
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        lowest, highest = churn_range
        gamma = min(churn / steps, math.sqrt(2) - 1) if lowest <= sigma <= highest else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            state = state + math.sqrt(raised**2 - sigma**2) * churn_noise * noise(i + 1)
        slope = (state - denoise(state, raised) / sigma_in) / raised
        ahead = state + (following - raised) * slope
        if order == 2 and following > 0:
            slope_ahead = (ahead - denoise(ahead, following) / sigma_in) / following
            ahead = state + (following - raised) * 0.5 * (slope + slope_ahead)
        state = ahead
    return state * sigma_in
