"""Batches of a level's tiles that are run through the network together.

Shapes: n videos in a batch, T tiles of a level; row = tile * n + video; the T * n rows are cut into batches. Sizes
are in pixels, in the axis order (f, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm_core.pyramid import Coords, Pyramid, Triple

__all__ = ["Layout", "TileBatch", "parent_by_parent", "tile_batches"]


@dataclass(frozen=True)
class Layout:
    """What all tiles of a batch of videos have in common: the pyramid, its downsampling, and the videos' labels."""

    pyramid: Pyramid
    downsampling: str
    labels: Tensor  # [n] long, on the device; -1 for none

    def coords(self, level: int, offsets: Tensor) -> Coords:
        """Return the coordinates of patches of ``level`` at ``offsets`` [B, 3], in the level's own pixels."""
        return self.pyramid.coords(level, offsets, downsampling=self.downsampling).to(self.labels.device)


@dataclass(frozen=True)
class TileBatch:
    """A batch of rows (tile, video) of a level, as runs of videos with the same tile."""

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
        """Add ``patches`` [B, C, f, h, w] to ``total`` [n, C, F, H, W] in place, each at the position of its row."""
        row = 0
        for view, count in self._views(total):
            view += patches[row : row + count]
            row += count

    def _views(self, state: Tensor) -> Iterator[tuple[Tensor, int]]:
        for (f, h, w), first, last in self.runs:
            frames, height, width = self.size
            yield state[first:last, :, f : f + frames, h : h + height, w : w + width], last - first


def tile_batches(level: int, offsets: Sequence[Triple], layout: Layout, *, size: int) -> list[TileBatch]:
    """Return batches of at most ``size`` rows that cover the tiles at ``offsets`` of all videos, tile by tile."""
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
                label=layout.labels[(rows % videos).to(device, non_blocking=True)],
                runs=tuple(runs),
                size=layout.pyramid.patch,
            )
        )
    return batches


def parent_by_parent(level: int, offsets: Sequence[Triple], layout: Layout) -> list[Triple]:
    """Return ``offsets`` sorted so that tiles with the same ancestors are adjacent."""
    return sorted(offsets, key=lambda offset: layout.pyramid.chain(level, offset))
