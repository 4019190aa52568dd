"""The paper's smallest model at its full width, on a plain CPU: it trains, goes on after a kill with the same
bits, and denoises tiles from cached contexts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.denoiser import Denoiser
from hpdm_core.base.randomness import generator, normal
from hpdm_core.diffusion import noise_clean
from hpdm_core.pyramid import Coords, Triple, level_patch
from hpdm_core.training.cost import count_parameters
from hpdm_core.training.trainer import Trainer, load_ema_model

MEMORY_BYTES = 20e9
STEPS = [
    "data.dataset={use: synthetic, classes: 101}",
    "training.batch=1",
    "training.steps=2",
    "training.learning_rate=1e-3",
    "training.optimizer=lamb",
    "training.self_conditioning=1",  # both passes with latents, as nearly always
    "training.label_dropout=0",
    "training.ema_halflife=2",
    "runtime.checkpoint_every=1",
    "runtime.log_every=1",
]
NARROW = [
    "model.video=[8, 16, 16]",
    "model.patch=[2, 4, 4]",
    "model.token=[1, 2, 2]",
    "model.token_dim=16",
    "model.blocks=3",
    "model.backbone={use: rin, latent_dim: 8, latents: 6, latent_layers: 1, latent_heads: 2, "
    "latent_head_dim: 4, heads: 2, latent_mlp_ratio: 2, token_mlp_ratio: 2}",
]


def train(assembly: Assembly, folder: Path, *previous: Path) -> dict[str, Any]:
    """Run one attempt in ``folder`` to the last step; its network is gone when this returns."""
    return Trainer(assembly, folder=folder, previous=previous).run()


def as_killed_after_the_first_step(attempt: Path, folder: Path) -> None:
    """Make ``folder`` what ``attempt`` was when its first checkpoint stood and the second step had begun."""
    name = "checkpoints/00000001"
    shutil.copytree(attempt / name, folder / name, copy_function=os.link)
    first, _ = (attempt / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(first + "\n")


def losses(attempt: Path) -> list[list[float | None]]:
    return [json.loads(line)["loss"] for line in (attempt / "metrics.jsonl").read_text().splitlines()]


def two_tiles(assembly: Assembly, weights: Path) -> tuple[Tensor, Tensor]:
    """Denoise the first and the last tile of the finest level at once, and the last one alone.

    Both times from the same contexts, made of one patch of level 0 and, for each tile, its own of level 1.
    """
    denoiser: Denoiser = assembly.denoiser(load_ema_model(assembly, weights))
    pyramid, seed = assembly.pyramid, assembly.config.seed
    clip = assembly.dataset.draw("held_out", generator(seed, "tiles"))
    tiles = pyramid.tiles(2, ())
    ends = [tiles[0], tiles[-1]]
    parents = [pyramid.chain(2, tile)[1] for tile in ends]
    assert parents[0] != parents[1]

    def given(level: int, offsets: list[Triple], sigma_eff: float) -> tuple[Tensor, Tensor, Coords, Tensor]:
        rows = len(offsets)
        patches = [level_patch(clip.video, pyramid, level, offset, "area") for offset in offsets]
        sigma = torch.full((rows,), sigma_eff / denoiser.sigma_in[level])
        noise = normal((rows, *patches[0].shape), seed, "tiles", level)
        z = noise_clean(torch.stack(patches), noise, sigma, denoiser.sigma_in[level])
        return z, sigma, pyramid.coords(level, torch.tensor(offsets)), torch.full((rows,), clip.label)

    low = assembly.config.sampling.context_sigma_eff
    whole = denoiser.encode(0, *given(0, [(0, 0, 0)], low), [])
    whole = whole.take(torch.tensor([0, 0]))
    sources = [whole, denoiser.encode(1, *given(1, parents, low), [whole])]
    z, sigma, coords, label = given(2, ends, 1.0)
    contexts = denoiser.contexts(2, coords, sources)
    both, _ = denoiser(2, z, sigma, coords, label, contexts, None)
    last = torch.tensor([1])
    alone, _ = denoiser(2, z[last], sigma[last], coords.take(last), label[last], contexts.take(last), None)
    return both, alone


def check(folder: Path, *, sets: list[str]) -> Assembly:
    """Train two steps, then again from the first one's checkpoint on, denoise two tiles, and compare.

    The files are large, and are deleted.
    """
    assembly = load_cell("hpdm_s", sets=[*STEPS, *sets])
    undisturbed, killed, resumed = (folder / name for name in ("undisturbed", "killed", "resumed"))
    try:
        train(assembly, undisturbed)
        as_killed_after_the_first_step(undisturbed, killed)
        result = train(assembly, resumed, killed)
        assert result["resumed_from"] == [1]
        assert losses(resumed) == losses(undisturbed) and len(losses(resumed)) == 2
        raw = "checkpoints/{:08d}/model.safetensors"
        assert same(undisturbed / raw.format(2), resumed / raw.format(2))
        assert same(undisturbed / "model.safetensors", resumed / "model.safetensors")
        assert not same(killed / raw.format(1), resumed / raw.format(2))
        both, alone = two_tiles(assembly, resumed / "model.safetensors")
    finally:
        for path in (undisturbed, killed, resumed):
            shutil.rmtree(path, ignore_errors=True)
    assert both.shape == (2, 3, *assembly.pyramid.patch)
    assert bool(both.isfinite().all())
    torch.testing.assert_close(alone, both[1:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[0], both[1], rtol=1e-3, atol=1e-3)
    return assembly


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_a_narrow_model_trains_goes_on_and_denoises_tiles(tmp_path: Path) -> None:
    check(tmp_path, sets=NARROW)


@pytest.mark.slow
@pytest.mark.timeout(15 * 60)  # two threads
def test_the_full_width_trains_goes_on_and_denoises_tiles(tmp_path: Path) -> None:
    assembly = check(tmp_path, sets=[])
    assert assembly.config.model.video == (64, 256, 256)
    assert count_parameters(assembly) > 150e6
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < MEMORY_BYTES
