"""The cascade with a real network: contexts computed once equal contexts computed at every call."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.sampling import sample
from tests.small import rin


@pytest.fixture(scope="module")
def make_cell():
    def make(fusion="deep", **runtime):
        cell = {
            "model": {
                "video": [8, 16, 24],
                "patch": [2, 4, 6],
                "token": [1, 2, 2],
                "classes": 3,
                "token_dim": 16,
                "blocks": 3,
                "backbone": rin(),
                "context_fusion": fusion,
            },
            "diffusion": {"noise_scaling": {"use": "exponential", "first": 1.0, "ratio": 2.0}},
            "data": {"dataset": "gaussian_world"},
            "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
            "sampling": {
                "solver": {"use": "edm", "steps": [3], "churn": [1.0, 0.0], "sigma_eff_max": [5.0]},
                "overlap": ["w"],
            },
            "runtime": {"sample_batch": 4, "tile_batch": 50, **runtime},
        }
        return load_cell(cell)

    return make


def lively(model):
    """Initial weights leave some paths silent (gains of 0); noise on all of them makes every path speak."""
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    return model


@dataclass
class Recipe:
    """How to compute an encoding, row by row, instead of the encoding."""

    arguments: tuple[Any, ...]
    sources: list[Any]

    def take(self, rows):
        level, z, sigma, coords, label = self.arguments
        taken = (level, z[rows], sigma[rows], coords.take(rows), label[rows])
        return Recipe(taken, [source.take(rows) for source in self.sources])

    @classmethod
    def cat(cls, parts):
        level, _, _, first, _ = parts[0].arguments
        columns = list(zip(*(part.arguments for part in parts), strict=True))
        offset = torch.cat([coords.offset for coords in columns[3]])
        coords = type(first)(offset=offset, scale=first.scale)
        joined = (level, torch.cat(columns[1]), torch.cat(columns[2]), coords, torch.cat(columns[4]))
        sources = [cls.cat(list(group)) for group in zip(*(part.sources for part in parts), strict=True)]
        return cls(joined, sources)


class Uncached:
    """The same denoiser, which encodes all parents anew for every tile at every call."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.sigma_in = denoiser.sigma_in
        self.encoded = 0

    def encode(self, level, z, sigma, coords, label, sources):
        return Recipe((level, z, sigma, coords, label), list(sources))

    def contexts(self, level, coords, sources):
        return coords, sources

    def __call__(self, level, z, sigma, coords, label, contexts, latents):
        made = None
        if contexts is not None:
            at, recipes = contexts
            made = self.denoiser.contexts(level, at, [self._run(recipe) for recipe in recipes])
        return self.denoiser(level, z, sigma, coords, label, made, latents)

    def _run(self, recipe):
        self.encoded += len(recipe.arguments[1])
        return self.denoiser.encode(*recipe.arguments, [self._run(source) for source in recipe.sources])


@pytest.mark.parametrize("fusion", ["deep", "deep_levels", "deep_pixels", "shallow_concat", "none"])
def test_cached_equals_uncached(fusion, make_cell):
    assembly = make_cell(fusion)
    denoiser = assembly.denoiser(lively(assembly.build_model()))
    cached = sample(assembly, denoiser, [0, 1], [1, -1])
    reference = Uncached(denoiser)
    uncached = sample(assembly, reference, [0, 1], [1, -1])
    assert reference.encoded > 100
    for level in range(3):
        assert torch.allclose(cached[level], uncached[level], atol=1e-5)
        assert cached[level].abs().max() > 0.1
    swapped = sample(assembly, denoiser, [0, 1], [-1, 1])
    assert not torch.allclose(cached[0], swapped[0], atol=1e-3)


def test_a_sample_of_a_network_is_the_same_in_any_batch(make_cell):
    def run(indices, **runtime):
        assembly = make_cell(**runtime)
        denoiser = assembly.denoiser(lively(assembly.build_model()))
        return sample(assembly, denoiser, indices, [index % 3 for index in indices])

    together = run([0, 1, 2])
    again = run([0, 1, 2])
    alone = run([1])
    small = run([0, 1, 2], sample_batch=2, tile_batch=7)
    for level in range(3):
        assert torch.equal(together[level], again[level])
        assert torch.allclose(together[level][1:2], alone[level], atol=1e-5)
        assert torch.allclose(together[level], small[level], atol=1e-5)
