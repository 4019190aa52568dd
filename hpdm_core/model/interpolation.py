"""Trilinear sampling of a coarse patch at the cells of a nested, axis-aligned finer one.

Equal to `torch.nn.functional.grid_sample` (align_corners=False, padding "border") at u -> 2u - 1, but written
for tokens, channels last: the grid is separable, so the work is three small matrix products over the part of
the parent that the child covers, and no gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hpdm_core.pyramid import Triple

__all__ = ["sample_cells", "sample_tokens"]


def sample_tokens(tokens: Tensor, grid: Triple, positions: Sequence[Tensor]) -> Tensor:
    """Return tokens [B, N, D] of a patch of ``grid`` cells interpolated at ``positions``: [B, n, D].

    ``positions``: per axis (f, h, w) a tensor [B, n_axis] in the patch's unit frame (0 = lower face, 1 =
    upper face), as `Coords.within` gives them. Gradients flow to the tokens, not to the positions.
    """
    f, h, w = grid
    cells = rearrange(tokens, "b (f h w) d -> b f h w d", f=f, h=h, w=w)
    return rearrange(sample_cells(cells, positions), "b f h w d -> b (f h w) d")


def sample_cells(cells: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Return ``cells`` [B, F, H, W, D] at ``positions`` (per axis [B, n_axis]): [B, n_f, n_h, n_w, D]."""
    sizes = cells.shape[1:4]
    starts, counts, weights = [], [], []
    for axis, size in zip(positions, sizes, strict=True):
        start, count = _covered(axis, size)
        starts.append(start)
        counts.append(count)
        weights.append(_hat(axis, size, start, count).to(cells.dtype))
    cells = _cut(cells, starts, counts)
    f, h, w = weights
    # Width first and frames last: the largest product is then one wide matrix per row of the batch.
    cells = torch.matmul(w[:, None, None], cells)  # [B, F, H, n_w, D]
    rows = rearrange(cells, "b f h w d -> b f h (w d)")
    rows = torch.matmul(h[:, None], rows)  # [B, F, n_h, n_w D]
    planes = rearrange(rows, "b f h x -> b f (h x)")
    planes = torch.bmm(f, planes)  # [B, n_f, n_h n_w D]
    return rearrange(planes, "b f (h w d) -> b f h w d", h=h.shape[1], w=w.shape[1], d=cells.shape[-1])


def _continuous(positions: Tensor, size: int) -> Tensor:
    """Positions in cells, centres at whole numbers, clamped to the outermost centres ("border")."""
    return (positions * size - 0.5).clamp(0, size - 1)


def _covered(positions: Tensor, size: int) -> tuple[list[int], int]:
    """First cell that each row of ``positions`` [B, n] needs, and how many cells from there serve every row.

    Only on the CPU: elsewhere the numbers would have to be waited for, and the whole axis costs less than the
    wait.
    """
    if positions.device.type != "cpu":
        return [0] * positions.shape[0], size
    places = _continuous(positions.detach(), size)
    first = places.amin(dim=1).floor().long()
    last = places.amax(dim=1).ceil().long()
    count = int((last - first).max()) + 1
    return first.clamp(max=size - count).tolist(), count


def _hat(positions: Tensor, size: int, starts: Sequence[int], count: int) -> Tensor:
    """Weights [B, n, count] of linear interpolation over the ``count`` cells from each row's start."""
    places = _continuous(positions, size)
    first = torch.tensor(starts, device=places.device, dtype=places.dtype)
    cells = first[:, None] + torch.arange(count, device=places.device, dtype=places.dtype)
    return (1 - (places[:, :, None] - cells[:, None, :]).abs()).clamp(min=0)


def _cut(cells: Tensor, starts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
    """Cut each row's box out of ``cells`` [B, F, H, W, D]."""
    if tuple(counts) == tuple(cells.shape[1:4]):
        return cells
    boxes = [
        tuple(slice(start, start + count) for start, count in zip(corner, counts, strict=True))
        for corner in zip(*starts, strict=True)
    ]
    cut: Tensor = _Boxes.apply(cells, boxes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return cut


class _Boxes(torch.autograd.Function):
    """Stack one box per row. Slices would do, but their gradient fills a patch with zeros once per axis."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, boxes: Sequence[tuple[slice, ...]]) -> Tensor:
        ctx.shape, ctx.boxes = cells.shape, boxes
        return torch.stack([row[box] for row, box in zip(cells, boxes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        whole = gradient.new_zeros(ctx.shape)
        for row, box, part in zip(whole, ctx.boxes, gradient, strict=True):
            row[box] = part
        return whole, None
