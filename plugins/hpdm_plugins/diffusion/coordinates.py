"""Coordinate samplers: they draw the positions of the nested patches of a training video (HPDM, section 4.1, Eq 6-9).

Offsets are integer numbers of each level's own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import Pyramid, Triple

__all__ = ["NestedTopDown", "NestedUniform", "SampledTiles"]


def _between(bounds: Sequence[tuple[int, int]], generator: torch.Generator) -> list[int]:
    """Draw one integer per axis, uniformly between its bounds (both included)."""
    return [int(torch.randint(first, last + 1, (), generator=generator)) for first, last in bounds]


def _contains(pyramid: Pyramid, level: int, parent: Triple, child: Triple) -> bool:
    """Whether the patch of ``level`` at ``child`` lies in the patch of ``level - 1`` at ``parent``."""
    bounds = pyramid.containing(level, child)
    return all(first <= start <= last for start, (first, last) in zip(parent, bounds, strict=True))


class NestedUniform:
    """Draws the finest offset uniformly, then each ancestor uniformly among the patches that contain its child.

    On the finest level, every position is drawn equally often, including those at the borders.
    """

    def __init__(self, pyramid: Pyramid) -> None:
        self.pyramid = pyramid

    def sample(self, generator: torch.Generator) -> Tensor:
        """See `hpdm_core.pyramid.CoordinateSampler`."""
        pyramid = self.pyramid
        finest = pyramid.levels - 1
        free = [(0, size - patch) for size, patch in zip(pyramid.size(finest), pyramid.patch, strict=True)]
        offsets = [_between(free, generator)]
        for level in range(finest, 0, -1):
            offsets.append(_between(pyramid.containing(level, offsets[-1]), generator))
        return torch.tensor(offsets[::-1], dtype=torch.int64)


class NestedTopDown:
    """Draws each offset uniformly within the patch of the coarser level: the paper's Eq 6, in integer pixels.

    Borders are drawn rarely: with 3 levels and 16-frame patches of 64 frames, the first offset has probability
    1/289, instead of 1/49 if it were uniform.
    """

    def __init__(self, pyramid: Pyramid) -> None:
        self.pyramid = pyramid

    def sample(self, generator: torch.Generator) -> Tensor:
        """See `hpdm_core.pyramid.CoordinateSampler`."""
        offsets = [[0, 0, 0]]
        for _ in range(1, self.pyramid.levels):
            within = [
                (q * start, q * start + (q - 1) * patch)
                for start, q, patch in zip(offsets[-1], self.pyramid.ratio, self.pyramid.patch, strict=True)
            ]
            offsets.append(_between(within, generator))
        return torch.tensor(offsets, dtype=torch.int64)


class SampledTiles:
    """Draws only patches that sampling uses: a tile of a level above 0, with its chain of parents.

    The level is uniform over those above 0, the tile uniform over the level's tiles; patches of finer levels are
    tiles of these levels within the coarser tile. ``overlap``: the axes on which tiles overlap by half, as in
    ``sampling.overlap``; tiles that exist only with more overlap are not trained.
    """

    def __init__(self, pyramid: Pyramid, *, overlap: tuple[Literal["f", "h", "w"], ...] = ()) -> None:
        self.pyramid = pyramid
        tiles = [pyramid.tiles(level, overlap) for level in range(pyramid.levels)]
        self.tiles = tiles
        # The tiles of the next level within each tile, computed once, because every video needs a draw.
        self.inside: list[dict[Triple, list[Triple]]] = [{} for _ in tiles]
        for level in range(1, pyramid.levels):
            for tile in tiles[level]:
                for parent in tiles[level - 1]:
                    if _contains(pyramid, level, parent, tile):
                        self.inside[level - 1].setdefault(parent, []).append(tile)

    def sample(self, generator: torch.Generator) -> Tensor:
        """See `hpdm_core.pyramid.CoordinateSampler`."""
        pyramid = self.pyramid
        level = int(torch.randint(1, pyramid.levels, (), generator=generator)) if pyramid.levels > 1 else 0
        offset = self._one_of(self.tiles[level], generator)
        offsets = [*pyramid.chain(level, offset), offset]
        for coarser in range(level, pyramid.levels - 1):
            offsets.append(self._one_of(self.inside[coarser][offsets[-1]], generator))
        return torch.tensor(offsets, dtype=torch.int64)

    @staticmethod
    def _one_of(tiles: Sequence[Triple], generator: torch.Generator) -> Triple:
        return tiles[int(torch.randint(len(tiles), (), generator=generator))]


@hookimpl
def register_coordinate_samplers(register: Register) -> None:
    """Add the built-in coordinate samplers."""
    register("nested_uniform", NestedUniform, source="ours: the paper's nesting with an even finest level")
    register("sampled_tiles", SampledTiles, source="ours: trains what tiled sampling visits, nothing else")
    register("nested_topdown", NestedTopDown, source="HPDM, section 4.1, Eq 6")
