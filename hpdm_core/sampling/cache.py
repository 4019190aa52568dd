"""What a level's tiles need of their parents, computed once before the first denoising step.

Parents are finished videos, so nothing that depends on them changes between steps (paper, section 4.4, and
beyond it: also the contexts are kept, not only the parents' features). Each distinct ancestor patch (video,
level, offset) is encoded once, each tile's contexts are computed once; the encodings are dropped when the
contexts are there.

Shapes: n videos in a batch, T tiles of a level; row = tile * n + video, cut into batches of whole rows. Sizes
in pixels, axis order (f, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hpdm_core.pyramid import Coords, Pyramid

__all__ = ["CascadeDenoiser", "EncodedRows", "Layout", "TileBatch", "level_contexts", "tile_batches"]

Triple = tuple[int, int, int]


class CascadeDenoiser(Protocol):
    """What the cascade calls: `hpdm_core.denoiser.Denoiser`, or anything with these methods.

    What ``encode`` and ``contexts`` return is opaque here, but an encoding has ``take(rows)`` (a gather of
    rows) and its class has ``cat(encodings)``. Rows of all arguments match.
    """

    sigma_in: tuple[float, ...]

    def encode(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        sources: Sequence[Any],
    ) -> Any:
        """Return patches z [B, C, F, H, W] as contexts; ``sources``: their own ancestors, coarsest first."""

    def contexts(self, level: int, coords: Coords, sources: Sequence[Any]) -> Any:
        """Return what the patches at ``coords`` need of their ancestors ``sources``, coarsest first."""

    def __call__(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        contexts: Any,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the denoised patches [B, C, F, H, W] in data units, and the latents for the next call."""


@dataclass(frozen=True)
class Layout:
    """What all rows of a batch of videos have in common: the pyramid, how it is made, and the labels."""

    pyramid: Pyramid
    downsampling: str
    labels: Tensor  # [n] long, on the device; -1 for none

    def coords(self, level: int, offsets: Tensor) -> Coords:
        """Return the coordinates of patches of ``level`` at ``offsets`` [B, 3], own pixels."""
        return self.pyramid.coords(level, offsets, downsampling=self.downsampling).to(self.labels.device)


@dataclass(frozen=True)
class TileBatch:
    """Some rows of a level, as runs of videos that share a tile. Crops from, and adds to, the whole state."""

    level: int
    tiles: Tensor  # [B] long, index of the row's tile
    videos: Tensor  # [B] long, index of the row's video in the batch
    coords: Coords
    label: Tensor  # [B] long, on the device
    runs: tuple[tuple[Triple, int, int], ...]  # offset of the tile, first video, one past the last video
    size: Triple

    def __len__(self) -> int:
        return len(self.tiles)

    def crop(self, state: Tensor) -> Tensor:
        """Return the rows' patches [B, C, f, h, w] of ``state`` [n, C, F, H, W]."""
        return torch.cat([view for view, _ in self._views(state)])

    def add(self, total: Tensor, patches: Tensor) -> None:
        """Add ``patches`` [B, C, f, h, w] to ``total`` [n, C, F, H, W] in place, where they were cut."""
        row = 0
        for view, count in self._views(total):
            view += patches[row : row + count]
            row += count

    def _views(self, state: Tensor) -> Iterator[tuple[Tensor, int]]:
        for (f, h, w), first, last in self.runs:
            frames, height, width = self.size
            yield state[first:last, :, f : f + frames, h : h + height, w : w + width], last - first


def tile_batches(level: int, offsets: Sequence[Triple], layout: Layout, *, size: int) -> list[TileBatch]:
    """Return patches at ``offsets`` of all videos, tile by tile, in batches of at most ``size`` rows."""
    videos = len(layout.labels)
    total = len(offsets) * videos
    device = layout.labels.device
    batches = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        rows = torch.arange(start, stop)
        tiles = rows // videos
        runs = []
        for tile in range(start // videos, (stop - 1) // videos + 1):
            first = max(start - tile * videos, 0)
            runs.append((offsets[tile], first, min(stop - tile * videos, videos)))
        batches.append(
            TileBatch(
                level=level,
                tiles=tiles,
                videos=rows % videos,
                coords=layout.coords(level, torch.tensor([offsets[tile] for tile in tiles.tolist()])),
                label=layout.labels[(rows % videos).to(device)],
                runs=tuple(runs),
                size=layout.pyramid.patch,
            )
        )
    return batches


class EncodedRows:
    """The encodings of many rows, kept in the chunks in which they were computed, ``size`` rows each."""

    def __init__(self, chunks: Sequence[Any], size: int) -> None:
        self._chunks = chunks
        self._size = size

    def take(self, rows: Tensor) -> Any:
        """Return the encodings of ``rows`` [B] long, CPU, in that order; rows may repeat."""
        chunks, inverse = torch.unique(rows // self._size, return_inverse=True)
        if len(chunks) == 1:
            return self._chunks[int(chunks[0])].take(rows % self._size)
        parts = []
        order = torch.empty_like(rows)  # where each row comes to lie in the concatenation
        done = 0
        for place, chunk in enumerate(chunks.tolist()):
            (mine,) = torch.nonzero(inverse == place, as_tuple=True)
            order[mine] = torch.arange(done, done + len(mine))
            done += len(mine)
            parts.append(self._chunks[chunk].take(rows[mine] % self._size))
        return type(parts[0]).cat(parts).take(order)


def level_contexts(
    denoiser: CascadeDenoiser,
    batches: Sequence[TileBatch],
    offsets: Sequence[Triple],
    layout: Layout,
    parents: Sequence[Tensor],
    sigmas: Sequence[float],
    *,
    size: int,
) -> list[Any]:
    """Return the contexts of each of a level's tile ``batches``.

    ``parents`` are the noised states z_k [n, C, F_k, H_k, W_k] of the coarser levels, ``sigmas`` their noise
    levels; at most ``size`` rows are encoded together.
    """
    if not parents:
        return [None] * len(batches)
    level = batches[0].level
    videos = len(layout.labels)
    chains = [layout.pyramid.chain(level, offset) for offset in offsets]
    encoded: list[EncodedRows] = []
    places: list[dict[tuple[Triple, ...], int]] = []  # per level: chain down to a patch -> index of the patch

    def sources(chain_of_row: Sequence[tuple[Triple, ...]], video_of_row: Tensor, below: int) -> list[Any]:
        taken = []
        for k in range(below):
            patch = torch.tensor([places[k][chain[: k + 1]] for chain in chain_of_row])
            taken.append(encoded[k].take(patch * videos + video_of_row))
        return taken

    for k, (state, sigma) in enumerate(zip(parents, sigmas, strict=True)):
        distinct = list(dict.fromkeys(chain[: k + 1] for chain in chains))
        chunks = []
        for batch in tile_batches(k, [chain[-1] for chain in distinct], layout, size=size):
            rows = [distinct[tile] for tile in batch.tiles.tolist()]
            noise_level = torch.full((len(batch),), sigma, device=state.device)
            chunks.append(
                denoiser.encode(
                    k,
                    batch.crop(state),
                    noise_level,
                    batch.coords,
                    batch.label,
                    sources(rows, batch.videos, k),
                )
            )
        encoded.append(EncodedRows(chunks, size))
        places.append({chain: index for index, chain in enumerate(distinct)})

    return [
        denoiser.contexts(
            level, batch.coords, sources([chains[tile] for tile in batch.tiles.tolist()], batch.videos, level)
        )
        for batch in batches
    ]
