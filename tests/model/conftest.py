"""A small network with sizes that all differ, built by hand, and entries for it."""

import math

import pytest
import torch

from hpdm_core.config.schema import ModelConfig
from hpdm_core.model.fusion import FusionShape
from hpdm_core.model.hpdm import HPDM, Patches
from hpdm_core.model.initialise import initialise
from hpdm_core.model.rin import RIN
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.model.fusions import DeepFusion, DeepLevels, DeepPixels, NoFusion, ShallowConcat

FUSIONS = {
    "deep": DeepFusion,
    "deep_levels": DeepLevels,
    "deep_pixels": DeepPixels,
    "none": NoFusion,
    "shallow_concat": ShallowConcat,
}


def make_pyramid(levels=3, token=(1, 2, 2)):
    video = (8, 24, 40) if levels == 3 else (2, 6, 10)
    return Pyramid(video=video, patch=(2, 6, 10), token=token, levels=levels)


def make_model(
    fusion="deep",
    *,
    levels_per_block=(1, 1, 2, 2, 3, 3),
    scramble=True,
    recall=True,
    seed=1,
    classes=5,
    sigma_on_tokens=True,
    token=(1, 2, 2),
    **options,
):
    """An HPDM; ``scramble`` moves parameters off their start, not self-conditioning's if not ``recall``."""
    pyramid = make_pyramid(levels_per_block[-1], token)
    config = ModelConfig(
        video=pyramid.video,
        patch=pyramid.patch,
        token=pyramid.token,
        levels=pyramid.levels,
        classes=classes,
        token_dim=24,
        blocks=len(levels_per_block),
        sigma_on_tokens=sigma_on_tokens,
    )
    shape = FusionShape(
        token_dim=24, grid=pyramid.grid, patch=pyramid.patch, levels_per_block=tuple(levels_per_block)
    )
    backbone = RIN(
        24,
        len(levels_per_block),
        latent_dim=10,
        latents=7,
        latent_layers=2,
        latent_heads=3,
        latent_head_dim=4,
        heads=4,
    )
    model = HPDM(
        config,
        backbone=backbone,
        fusion=FUSIONS[fusion](shape, **options) if isinstance(fusion, str) else fusion(shape, **options),
        levels_per_block=levels_per_block,
        pyramid=pyramid,
        sigma_range=(0.002, 80.0),
    )
    initialise(model, seed=seed)
    if scramble:
        start = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if recall or "recall_gain" not in name:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=start)
    return model


def make_entries(model, *, batch=2, seed=0, requires_grad=False):
    """One entry per level at nested places, fed by all coarser ones."""
    start = torch.Generator().manual_seed(seed)
    places = {
        0: [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        1: [[1, 3, 5], [0, 6, 2], [2, 0, 9]],
        2: [[3, 10, 14], [1, 15, 7], [6, 2, 30]],
    }
    entries = []
    for level in range(model.pyramid.levels):
        shape = (batch, 3, *model.pyramid.patch)
        noisy = torch.randn(shape, generator=start).requires_grad_(requires_grad)
        sigma = torch.exp(torch.randn(batch, generator=start) - 1.2)
        coords = model.pyramid.coords(level, torch.tensor(places[level][:batch]))
        label = torch.tensor([3, -1, 0][:batch])
        entries.append(Patches(level, noisy, sigma, coords, label, tuple(range(level))))
    return entries


class SpyBackbone:
    """Wraps a model's backbone and notes (block, rows) of each call, and the rows of each start."""

    def __init__(self, backbone):
        self.calls, self.starts = [], []
        run, start = backbone.run, backbone.start

        def spy_run(block, tokens, latents, condition):
            self.calls.append((block, tokens.shape[0]))
            return run(block, tokens, latents, condition)

        def spy_start(previous, batch):
            self.starts.append((previous is not None, batch))
            return start(previous, batch)

        backbone.run, backbone.start = spy_run, spy_start


def plain_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.fixture
def build():
    return make_model


@pytest.fixture
def entries_for():
    return make_entries


@pytest.fixture
def spy():
    return SpyBackbone


@pytest.fixture
def gelu():
    return plain_gelu
