"""The coarser patches that are context for a level's tiles, each encoded once.

Parents are cut from finished levels, so nothing that depends on them alone changes between steps (paper, section
4.4). A patch is identified by its video and by its chain: the offsets of its ancestors and its own, coarsest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpdm_core.pyramid import Coords, Triple
from hpdm_core.sampling.tiles import Layout, TileBatch

__all__ = ["Ancestors", "CascadeDenoiser"]

Chain = tuple[Triple, ...]
Row = tuple[Chain, int]
"""A patch of a video: its chain, and the video's index in the batch."""


class CascadeDenoiser(Protocol):
    """The interface of denoisers: `hpdm_core.assembly.denoiser.Denoiser`, or anything with these methods.

    The return values of ``encode`` and ``contexts`` are opaque to the cascade, except that an encoding has
    ``take(rows)`` (a gather of rows) and its class has ``cat(encodings)``. Rows of all arguments match.
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
        """Return the contexts of the patches at ``coords`` from their ancestors ``sources``, coarsest first."""

    def __call__(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        contexts: Any,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the denoised patches [B, C, F, H, W] in data units, and the latents for the next call or None."""


class Ancestors:
    """The encoded ancestors of a level's tiles: `encode` adds to them, `keep` drops those no longer needed.

    ``states`` are the noised states z_k [n, C, F_k, H_k, W_k] of the coarser levels, ``sigmas`` their noise
    levels; at most ``size`` rows are encoded together.
    """

    def __init__(
        self,
        denoiser: CascadeDenoiser,
        layout: Layout,
        states: Sequence[Tensor],
        sigmas: Sequence[float],
        *,
        size: int,
    ) -> None:
        self._denoiser = denoiser
        self._layout = layout
        self._states = states
        self._sigmas = sigmas
        self._size = size
        self._chunks: list[dict[int, Any]] = [{} for _ in states]  # per level: number -> encoded rows
        self._places: list[dict[Row, tuple[int, int]]] = [{} for _ in states]  # row -> chunk, row in it
        self._numbers = itertools.count()

    @property
    def nbytes(self) -> int:
        """Memory of the encodings that are held, in bytes."""
        return sum(getattr(chunk, "nbytes", 0) for chunks in self._chunks for chunk in chunks.values())

    def encode(self, batches: Iterable[TileBatch]) -> None:
        """Encode the missing ancestors of the tiles in ``batches``, level by level, in full batches."""
        rows = [row for batch in batches for row in self._rows(batch)]
        for k in range(len(self._states)):
            wanted = dict.fromkeys((chain[: k + 1], video) for chain, video in rows)
            missing = [row for row in wanted if row not in self._places[k]]
            for start in range(0, len(missing), self._size):
                self._encode(k, missing[start : start + self._size])

    def contexts(self, batch: TileBatch) -> Any:
        """Return the contexts of the tiles in ``batch``, whose ancestors must be encoded."""
        return self._denoiser.contexts(
            batch.level, batch.coords, self._sources(self._rows(batch), len(self._states))
        )

    def keep(self, batches: Iterable[TileBatch]) -> None:
        """Drop all encodings except those that the tiles in ``batches`` need."""
        rows = [row for batch in batches for row in self._rows(batch)]
        for k, (chunks, places) in enumerate(zip(self._chunks, self._places, strict=True)):
            wanted = {(chain[: k + 1], video) for chain, video in rows}
            used = {chunk for row, (chunk, _) in places.items() if row in wanted}
            self._chunks[k] = {number: chunk for number, chunk in chunks.items() if number in used}
            self._places[k] = {row: place for row, place in places.items() if place[0] in used}

    def _rows(self, batch: TileBatch) -> list[Row]:
        chains = {offset: self._layout.pyramid.chain(batch.level, offset) for offset, _, _ in batch.runs}
        return [(chains[offset], video) for offset, first, last in batch.runs for video in range(first, last)]

    def _encode(self, level: int, rows: Sequence[Row]) -> None:
        layout, state = self._layout, self._states[level]
        f, h, w = layout.pyramid.patch
        patches = [
            state[video, :, top : top + f, left : left + h, right : right + w]
            for chain, video in rows
            for top, left, right in [chain[-1]]
        ]
        videos = torch.tensor([video for _, video in rows])
        number = next(self._numbers)
        self._chunks[level][number] = self._denoiser.encode(
            level,
            torch.stack(patches),
            torch.full((len(rows),), self._sigmas[level], device=state.device, dtype=state.dtype),
            layout.coords(level, torch.tensor([chain[-1] for chain, _ in rows])),
            layout.labels[videos.to(layout.labels.device, non_blocking=True)],
            self._sources(rows, level),
        )
        self._places[level].update((row, (number, place)) for place, row in enumerate(rows))

    def _sources(self, rows: Sequence[Row], below: int) -> list[Any]:
        """Return the encodings of the rows' ancestors on the levels ``below`` a level, coarsest first."""
        return [self._take(k, [(chain[: k + 1], video) for chain, video in rows]) for k in range(below)]

    def _take(self, level: int, rows: Sequence[Row]) -> Any:
        places = [self._places[level][row] for row in rows]
        device = self._layout.labels.device
        numbers = list(dict.fromkeys(number for number, _ in places))
        parts, order, done = [], torch.empty(len(rows), dtype=torch.long), 0
        for number in numbers:
            mine = [index for index, (chunk, _) in enumerate(places) if chunk == number]
            taken = torch.tensor([places[index][1] for index in mine])
            parts.append(self._chunks[level][number].take(taken.to(device, non_blocking=True)))
            order[mine] = torch.arange(done, done + len(mine))  # positions in the concatenation
            done += len(mine)
        if len(parts) == 1:
            return parts[0]
        return type(parts[0]).cat(parts).take(order.to(device, non_blocking=True))
