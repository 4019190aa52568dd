"""The base class of context fusions, which bring information from coarse patches into finer ones.

A fusion has three methods. `pixel_context` makes additional channels for a patch's tokenizer, `token_context`
computes all that depends on the parents alone, and `fuse` adds it to the tokens before a block. Only `fuse` is
called at each denoising step; the results of the other two are computed once per tile and reused.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hpdm_core.pyramid import Coords, Triple

__all__ = ["ContextFusion", "FusionShape", "Source"]


@dataclass(frozen=True)
class FusionShape:
    """The sizes that a fusion is built from.

    ``grid``: tokens of a patch per axis; ``patch``: pixels of a patch per axis; ``levels_per_block[b]``: how many
    levels block b runs.
    """

    token_dim: int
    grid: Triple
    patch: Triple
    levels_per_block: tuple[int, ...]
    channels: int = 3

    @property
    def levels(self) -> int:
        """Number of levels of the pyramid."""
        return self.levels_per_block[-1]

    @property
    def fused_blocks(self) -> tuple[int, ...]:
        """The blocks that run more than one level. Context is fused only before these blocks."""
        return tuple(block for block, count in enumerate(self.levels_per_block) if count > 1)

    def first_block(self, level: int) -> int:
        """Return the first block that runs ``level``."""
        return next(block for block, count in enumerate(self.levels_per_block) if count > level)


@dataclass(frozen=True)
class Source:
    """A coarser patch as context. Row i is the context of the child's row i."""

    level: int
    coords: Coords
    sigma: Tensor
    """[B], noise level of the process."""
    sigma_embedding: Tensor
    """[B, D], including the learned vector of the level."""
    noisy: Tensor
    """[B, C, F, H, W], c_in * z."""
    tokens: Tensor | None = None
    """[B, N, D], the block's input before the source's own fusion; None where the context is not for a block."""


class ContextFusion(nn.Module):
    """Base class, without any context. Subclasses are built as ``factory(shape, *, options)``.

    Parameters that a subclass makes in its constructor are drawn from a random stream keyed by the cell's seed.
    """

    extra_channels: int = 0
    """Channels added to every level's tokenizer input; they are zero where there is no pixel context."""

    reads_tokens: bool = True
    """Whether `token_context` uses ``Source.tokens``.

    When False, they are None, and parents that only serve as context are never run through the network.
    """

    def __init__(self, shape: FusionShape | None = None) -> None:
        super().__init__()
        if shape is not None:
            self.shape = shape

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """Return [B, extra_channels, F, H, W] for a patch's tokenizer. Called once per patch, for ``level`` >= 1."""
        return None

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """Return a tensor, batch first, computed from the parents alone; None for no context.

        ``sources`` are the parents, levels 0..level-1, coarsest first. Row i depends on row i only. The pixels and
        tokens of the child are not available here.
        """
        return None

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """Return the child's tokens [B, N, D] with context. Called for every block that runs ``level`` >= 1."""
        return tokens

    def kind(self, block: int) -> Hashable:
        """Return a key that is equal for blocks whose `token_context` costs the same: they do the same operations, with
        their own weights. `hpdm_core.training.cost` counts one block per key. By default every block has its own key.
        """
        return block
