"""Every level has its own noise, but no patch has less of it than its parents: sampling makes those first."""

import torch

from hpdm_core import hookimpl
from hpdm_core.diffusion import plan


class SortedNoise:
    def __init__(self, sigma_in, *, mean: float = 0.0, std: float = 1.2):
        self.slots = plan(len(sigma_in))
        self.sigma_in, self.mean, self.std = torch.tensor(sigma_in), mean, std

    def draw(self, generator):
        sigma_eff = (self.mean + self.std * torch.randn(len(self.slots), generator=generator)).exp()
        return sigma_eff.sort().values / self.sigma_in, torch.ones(len(self.slots), dtype=torch.bool)


@hookimpl
def register_noise_samplers(register):
    register("sorted_noise", SortedNoise, source="an example: docs/examples.md")
