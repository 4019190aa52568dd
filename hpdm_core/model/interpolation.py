"""Trilinear sampling of a coarse patch at the cells of a nested, axis-aligned finer one.

Equal to `torch.nn.functional.grid_sample` (align_corners=False, padding "border") at u -> 2u - 1, but written
for tokens, channels last. The grid is separable, so the computation is three small matrix products over the
part of the parent that the child covers. Sampling is linear and its weights sum to one, so a linear layer may be
applied to the few covered cells instead of the many samples.

The number of covered cells follows from the extents of the two patches alone, which are Python numbers. So
there is no device synchronisation, and shapes are the same at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from hpdm_core.pyramid import Triple

__all__ = ["Cover", "cover", "sample_cells", "sample_tokens"]

ROUNDING = 1e-5
"""In cells: a sample within this distance of a cell's centre is treated as lying on it."""


@dataclass(frozen=True)
class Cover:
    """The box of a patch's cells that the samples of each row need, and the interpolation weights over it.

    ``rows`` [B * count]: indices of the box's cells among all B * N cells of the batch, row-major; None for the
    whole patch. ``counts``: cells of the box per axis. ``weights``: per axis [B, n, count of the axis], each row
    summing to one.
    """

    rows: Tensor | None
    counts: Triple
    weights: tuple[Tensor, Tensor, Tensor]

    @property
    def cells(self) -> int:
        """Number of cells of a row's box."""
        return math.prod(self.counts)

    def cut(self, cells: Tensor) -> Tensor:
        """Return each row's box out of the patches' cells [B, N, D]: [B, count, D]."""
        if self.rows is None:
            return cells
        batch, _, width = cells.shape
        return cells.reshape(-1, width).index_select(0, self.rows).view(batch, -1, width)

    def sample(self, box: Tensor) -> Tensor:
        """Interpolate the box from `cut`, [B, count, D], at the samples: [B, n_f * n_h * n_w, D]."""
        f, h, w = (weights.to(box.dtype) for weights in self.weights)
        width = box.shape[-1]
        cells = rearrange(box, "b (f h w) d -> b f h w d", f=self.counts[0], h=self.counts[1])
        # Width first and frames last: the largest product is then one wide matrix product per row of the batch.
        cells = torch.matmul(w[:, None, None], cells)  # [B, F, H, n_w, D]
        lines = rearrange(cells, "b f h w d -> b f h (w d)")
        lines = torch.matmul(h[:, None], lines)  # [B, F, n_h, n_w D]
        planes = rearrange(lines, "b f h x -> b f (h x)")
        return torch.bmm(f, planes).view(len(box), -1, width)  # [B, n_f n_h n_w, D]


def cover(positions: Sequence[Tensor], grid: Triple, extent: Sequence[float] | None = None) -> Cover:
    """Return the cells of a patch of ``grid`` cells, with weights, that interpolation at ``positions`` needs.

    ``positions``: per axis (f, h, w) a tensor [B, n_axis] in the patch's unit frame (0 = lower face, 1 =
    upper face), evenly spaced and increasing, as `Coords.within` returns them. ``extent``: the share of the
    patch that the samples' own patch covers per axis, 1 for all of it; None computes it from the positions,
    which needs a device synchronisation on an accelerator.
    """
    starts, counts, weights = [], [], []
    for index, (axis, size) in enumerate(zip(positions, grid, strict=True)):
        places = (axis.detach() * size - 0.5).clamp(0, size - 1)  # in cells; clamped to the border
        count = _count(places, size, None if extent is None else extent[index], axis.shape[1])
        start = (places[:, 0] + ROUNDING).floor().clamp(max=size - count)  # [B]
        steps = torch.arange(count, device=axis.device, dtype=axis.dtype)
        hats = (1 - (places[:, :, None] - (start[:, None] + steps)[:, None, :]).abs()).clamp(min=0)
        starts.append(start.long())
        counts.append(count)
        weights.append(hats)
    whole = tuple(counts) == tuple(grid)
    made = (counts[0], counts[1], counts[2])
    return Cover(
        rows=None if whole else _rows(starts, made, grid),
        counts=made,
        weights=(weights[0], weights[1], weights[2]),
    )


def _count(places: Tensor, size: int, extent: float | None, samples: int) -> int:
    """Return how many cells, counted from a row's first one, are enough for the ``samples`` of every row."""
    if extent is None:
        first = (places[:, 0] + ROUNDING).floor()
        count = int((places[:, -1] - ROUNDING).ceil().sub(first).max()) + 1
    else:
        span = extent * size * (samples - 1) / samples  # from the first sample to the last
        count = math.ceil(span - 2 * ROUNDING) + 2  # for any position of the first one between two cells
    return min(count, size)


def _rows(starts: Sequence[Tensor], counts: Triple, grid: Triple) -> Tensor:
    """Return the indices of the boxes' cells among all cells of the batch, row-major."""
    index = torch.arange(len(starts[0]), device=starts[0].device)[:, None]
    for start, count, size in zip(starts, counts, grid, strict=True):
        along = start[:, None] + torch.arange(count, device=start.device)  # [B, count]
        index = (index[:, :, None] * size + along[:, None, :]).flatten(1)
    return index.flatten()


def sample_tokens(
    tokens: Tensor, grid: Triple, positions: Sequence[Tensor], extent: Sequence[float] | None = None
) -> Tensor:
    """Return tokens [B, N, D] of a patch of ``grid`` cells interpolated at ``positions``: [B, n, D].

    See `cover` for ``positions`` and ``extent``. Gradients flow to the tokens, not to the positions.
    """
    found = cover(positions, grid, extent)
    return found.sample(found.cut(tokens))


def sample_cells(cells: Tensor, positions: Sequence[Tensor], extent: Sequence[float] | None = None) -> Tensor:
    """Return ``cells`` [B, F, H, W, D] at ``positions`` (per axis [B, n_axis]): [B, n_f, n_h, n_w, D]."""
    f, h, w = cells.shape[1:4]
    sampled = sample_tokens(rearrange(cells, "b f h w d -> b (f h w) d"), (f, h, w), positions, extent)
    shape = {"f": positions[0].shape[1], "h": positions[1].shape[1]}
    return rearrange(sampled, "b (f h w) d -> b f h w d", **shape)
