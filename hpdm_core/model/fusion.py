"""How coarse patches inform finer ones: the base class that every context fusion extends.

A fusion answers three questions. What goes into a patch's tokenizer (`pixel_context`), what depends on the
parents alone (`token_context`), and how tokens take it up before a block (`fuse`). Only `fuse` is called at
each denoising step; the rest is computed once per tile and reused.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hpdm_core.pyramid import Coords, Triple

__all__ = ["ContextFusion", "FusionShape", "Source"]


@dataclass(frozen=True)
class FusionShape:
    """All that a fusion knows when it is built.

    ``grid`` tokens and ``patch`` pixels of a patch per axis; ``levels_per_block[b]`` levels that block b
    runs.
    """

    token_dim: int
    grid: Triple
    patch: Triple
    levels_per_block: tuple[int, ...]
    channels: int = 3

    @property
    def levels(self) -> int:
        """Levels of the pyramid."""
        return self.levels_per_block[-1]

    @property
    def fused_blocks(self) -> tuple[int, ...]:
        """The blocks that run more than one level: those before which there is something to fuse."""
        return tuple(block for block, count in enumerate(self.levels_per_block) if count > 1)

    def first_block(self, level: int) -> int:
        """Return the first block that runs ``level``."""
        return next(block for block, count in enumerate(self.levels_per_block) if count > level)


@dataclass(frozen=True)
class Source:
    """A coarser patch as context: row i belongs to the child's row i."""

    level: int
    coords: Coords
    sigma: Tensor
    """[B], noise level of the process."""
    sigma_embedding: Tensor
    """[B, D], with the level's own vector in it."""
    noisy: Tensor
    """[B, C, F, H, W], c_in * z."""
    tokens: Tensor | None = None
    """[B, N, D], the input of the block before the source's own fusion; None where no block is meant."""


class ContextFusion(nn.Module):
    """Base class: no context at all. Subclasses are built as ``factory(shape, *, options)``.

    Parameters that a subclass makes in its constructor start from a stream of the cell's seed.
    """

    extra_channels: int = 0
    """Channels added to every level's tokenizer input; the network writes zeros where there is no context."""

    reads_tokens: bool = True
    """Whether `token_context` looks at ``Source.tokens``.

    When False they are None, and parents that only serve as context are never run through the network.
    """

    def __init__(self, shape: FusionShape | None = None) -> None:
        super().__init__()
        if shape is not None:
            self.shape = shape

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """Return [B, extra_channels, F, H, W] for a patch's tokenizer; ``level`` >= 1; once per patch."""
        return None

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """Return anything batch-first that depends on the parents (levels 0..level-1, coarsest first) alone.

        Row i comes from row i only. The child itself is never seen.
        """
        return None

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """Return the child's tokens [B, N, D]; called for every block that runs ``level`` >= 1."""
        return tokens

    def kind(self, block: int) -> Hashable:
        """Return what tells a block's `token_context` from others by its cost: those of one kind do the same with
        arguments of one form, each with its own weights, and are counted once. By default every block is of its
        own.
        """
        return block
