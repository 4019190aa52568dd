"""A small network with a fusion, input patches for it, and direct calls of the fusion, for the checks of fusions.

All sizes differ, so that swapped axes are detected: B batch 3, D token width 16, M latents 6, E latent width 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpdm_core.base.randomness import generator, keyed_global_rng, normal
from hpdm_core.config.schema import ModelConfig
from hpdm_core.model.fusion import ContextFusion, FusionShape, Source
from hpdm_core.model.hpdm import HPDM, Patches
from hpdm_core.model.initialise import initialise
from hpdm_core.model.rin import RIN
from hpdm_core.pyramid import Pyramid

__all__ = [
    "BATCH",
    "SETTINGS",
    "SINGLE_LEVEL",
    "TOKEN_DIM",
    "Setting",
    "call_fuse",
    "call_pixel_context",
    "call_token_context",
    "entries",
    "network",
    "sources",
]

BATCH = 3
TOKEN_DIM = 16
CLASSES = 2


@dataclass(frozen=True)
class Setting:
    """A pyramid, and how many of its levels each block runs."""

    pyramid: Pyramid
    levels_per_block: tuple[int, ...]

    @property
    def shape(self) -> FusionShape:
        """The sizes that a fusion is built from."""
        return FusionShape(
            token_dim=TOKEN_DIM,
            grid=self.pyramid.grid,
            patch=self.pyramid.patch,
            levels_per_block=self.levels_per_block,
            channels=self.pyramid.channels,
        )

    @property
    def calls(self) -> list[tuple[int, int]]:
        """Every (block, level) at which a level is fused: level >= 1, and the block runs it."""
        return [
            (block, level) for block, count in enumerate(self.levels_per_block) for level in range(1, count)
        ]


SETTINGS = (
    # Grid 2x2x2, every level twice as fine; levels enter one by one.
    Setting(Pyramid(video=(8, 24, 40), patch=(2, 6, 10), token=(1, 3, 5), levels=3), (1, 2, 3)),
    # Grid 2x3x4, each level 1, 2 and 3 times as fine per axis as the last; the first block runs two levels.
    Setting(Pyramid(video=(2, 24, 108), patch=(2, 6, 12), token=(1, 2, 3), levels=3), (2, 3, 3)),
    # Four levels of video with one channel; the last block adds two levels at once.
    Setting(Pyramid(video=(24, 10, 48), patch=(3, 10, 6), token=(3, 5, 2), levels=4, channels=1), (1, 2, 4)),
)
SINGLE_LEVEL = Setting(Pyramid(video=(4, 6, 10), patch=(4, 6, 10), token=(2, 3, 5), levels=1), (1, 1))


def network(setting: Setting, fusion: ContextFusion, *, seed: int = 0, device: str = "cpu") -> HPDM:
    """Return a small network with ``fusion``; its other weights are drawn from ``seed``."""
    pyramid = setting.pyramid
    config = ModelConfig(
        video=pyramid.video,
        patch=pyramid.patch,
        token=pyramid.token,
        levels=pyramid.levels,
        channels=pyramid.channels,
        classes=CLASSES,
        token_dim=TOKEN_DIM,
        blocks=len(setting.levels_per_block),
    )
    with torch.device(device), keyed_global_rng(seed, "model.backbone"):
        backbone = RIN(
            TOKEN_DIM,
            len(setting.levels_per_block),
            latent_dim=12,
            latents=6,
            latent_layers=1,
            latent_heads=2,
            latent_head_dim=6,
            heads=2,
        )
        model = HPDM(
            config,
            backbone=backbone,
            fusion=fusion,
            levels_per_block=setting.levels_per_block,
            pyramid=pyramid,
            sigma_range=(0.002, 80.0),
        )
    if device != "meta":
        initialise(model, seed=seed)
    return model


def entries(setting: Setting, *, seed: int = 0, sigma: float | None = None) -> list[Patches]:
    """Return the entries of a joint pass: one per level, nested, each with all coarser ones as sources.

    ``sigma``: one noise level for all entries; None draws one per row and level.
    """
    pyramid = setting.pyramid
    finest = pyramid.levels - 1
    stream = generator(seed, "conformance", "offsets")
    room = [size - patch + 1 for size, patch in zip(pyramid.size(finest), pyramid.patch, strict=True)]
    corners = [[int(torch.randint(places, (), generator=stream)) for places in room] for _ in range(BATCH)]
    chains = [(*pyramid.chain(finest, (f, h, w)), (f, h, w)) for f, h, w in corners]
    label = torch.tensor([0, 1, -1])
    made = []
    for level in range(pyramid.levels):
        offsets = torch.tensor([chain[level] for chain in chains])
        drawn = normal((BATCH,), seed, "conformance", "sigma", level).exp()
        made.append(
            Patches(
                level=level,
                noisy=normal((BATCH, pyramid.channels, *pyramid.patch), seed, "conformance", "noisy", level),
                sigma=drawn if sigma is None else torch.full((BATCH,), sigma),
                coords=pyramid.coords(level, offsets),
                label=label,
                sources=tuple(range(level)),
            )
        )
    return made


def sources(
    setting: Setting, entries: Sequence[Patches], block: int, level: int, *, reads_tokens: bool = True
) -> list[Source]:
    """Return the sources of `ContextFusion.token_context` for ``block`` and ``level``: levels 0 .. level - 1."""
    tokens = setting.pyramid.grid[0] * setting.pyramid.grid[1] * setting.pyramid.grid[2]

    def drawn(*shape: int, name: str, source: int) -> Tensor:
        return normal((BATCH, *shape, TOKEN_DIM), 0, "conformance", name, block, source)

    return [
        Source(
            level=entry.level,
            coords=entry.coords,
            sigma=entry.sigma,
            sigma_embedding=drawn(name="sigma_embedding", source=index),
            noisy=entry.noisy,
            tokens=drawn(tokens, name="tokens", source=index) if reads_tokens else None,
        )
        for index, entry in enumerate(entries[:level])
    ]


def _rows_of(found: Sequence[Source], rows: Tensor) -> list[Source]:
    """Return the given rows of every tensor of the sources."""
    return [
        replace(
            source,
            coords=source.coords.take(rows),
            sigma=source.sigma[rows],
            sigma_embedding=source.sigma_embedding[rows],
            noisy=source.noisy[rows],
            tokens=None if source.tokens is None else source.tokens[rows],
        )
        for source in found
    ]


def call_pixel_context(
    setting: Setting,
    patches: Sequence[Patches],
    level: int,
    fusion: ContextFusion,
    *,
    rows: Tensor | None = None,
) -> Tensor | None:
    """Call `ContextFusion.pixel_context` for ``level``'s entry, or some of its rows."""
    coords = patches[level].coords
    # Pixel context is not for a block, so the sources have no tokens.
    found = sources(setting, patches, 0, level, reads_tokens=False)
    if rows is not None:
        coords, found = coords.take(rows), _rows_of(found, rows)
    return fusion.pixel_context(level, coords, found)


def call_token_context(
    setting: Setting,
    patches: Sequence[Patches],
    block: int,
    level: int,
    fusion: ContextFusion,
    *,
    rows: Tensor | None = None,
) -> Tensor | None:
    """Call `ContextFusion.token_context` for ``level``'s entry in ``block``, or some of its rows."""
    coords = patches[level].coords
    found = sources(setting, patches, block, level, reads_tokens=fusion.reads_tokens)
    if rows is not None:
        coords, found = coords.take(rows), _rows_of(found, rows)
    return fusion.token_context(block, level, coords, found)


def call_fuse(
    patches: Sequence[Patches],
    block: int,
    level: int,
    tokens: Tensor,
    context: Tensor | None,
    fusion: ContextFusion,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Call `ContextFusion.fuse` for ``level``'s entry in ``block``, or some of its rows."""
    coords, sigma = patches[level].coords, patches[level].sigma
    if rows is not None:
        coords, sigma = coords.take(rows), sigma[rows]
    return fusion.fuse(block, level, tokens, context, coords, sigma)
