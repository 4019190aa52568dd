"""Coordinate samplers: where the nested patches of a training video lie (HPDM, section 4.1, Eq 6-9).

Offsets are whole numbers of each level's own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import Pyramid

__all__ = ["NestedTopDown", "NestedUniform"]


def _between(bounds: Sequence[tuple[int, int]], generator: torch.Generator) -> list[int]:
    """Draw one whole number per axis, uniform over its bounds (both included)."""
    return [int(torch.randint(first, last + 1, (), generator=generator)) for first, last in bounds]


class NestedUniform:
    """The finest offset uniform over its lattice, then each ancestor uniform among those that contain it.

    Every place of the video is trained equally often on the finest level, borders included.
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
    """Each offset uniform over the patch before it: the paper's Eq 6, on each level's own lattice.

    Starves borders: at 3 levels and 16-frame patches of 64 frames the first offset has probability 1/289,
    against 1/49 when uniform.
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


@hookimpl
def register_coordinate_samplers(register: Register) -> None:
    """Add the built-in coordinate samplers."""
    register("nested_uniform", NestedUniform, source="ours: the paper's nesting with an even finest level")
    register("nested_topdown", NestedTopDown, source="HPDM, section 4.1, Eq 6")
