"""DPM-Solver++(2M): second order with one call of the denoiser per step, as it keeps the answer before."""

from itertools import pairwise
from math import log
from typing import Annotated

from pydantic import Field

from hpdm_core import hookimpl
from hpdm_core.solver import karras_sigmas


class Multistep:
    def __init__(self, sigma_in, *, steps: Annotated[int, Field(gt=0)] = 32, sigma_eff_max: float = 80.0):
        self.sigma_in, self.steps = sigma_in, steps
        self.sigmas = [karras_sigmas(steps, sigma_eff_max / scale, 0.01 / scale, 7.0) for scale in sigma_in]

    def calls(self, level):
        return self.steps

    def solve(self, level, denoise, noise):
        z, before, last = noise(0) * self.sigmas[level][0], None, None
        for sigma, following in pairwise(self.sigmas[level]):
            aim = clean = denoise(z, sigma)
            if last is not None and following > 0:
                aim = clean + log(sigma / following) / log(before / sigma) / 2 * (clean - last)
            z = following / sigma * z + (1 - following / sigma) * aim / self.sigma_in[level]
            before, last = sigma, clean
        return z * self.sigma_in[level]


@hookimpl
def register_solvers(register):
    register("multistep", Multistep, source="Lu et al. 2022 (2211.01095), Algorithm 2")
