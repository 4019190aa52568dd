"""What the network asks of a backbone: blocks that update tokens, with or without a latent state beside them.

The backbone knows nothing of levels, patches or context: all active levels come folded into the batch.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Base class of backbones, built as ``factory(token_dim, blocks, *, options)``; one that names a third
    positional parameter, ``grid``, is handed the tokens of a patch per axis (f, h, w) as well.

    A backbone without state starts from None, and runs every block with None for the latents. Then there is
    nothing for self-conditioning to pass on, and the network runs no first pass.
    """

    def start(self, previous: Tensor | None, batch: int) -> Tensor | None:
        """Return the latents [B, M, E] that enter the first block, or None where there is no state.

        ``previous`` [B, M, E] are the latents that an earlier pass ended with (self-conditioning); None means
        zeros. Whether there are latents depends on neither argument.
        """
        raise NotImplementedError

    def run(
        self, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block: tokens [B, N, D], latents [B, M, E], condition [B, K, D] -> (tokens, latents).

        Tokens are row-major over the grid (f, h, w). Latents are None, in and out, where `start` gave none.
        """
        raise NotImplementedError

    def kind(self, block: int) -> Hashable:
        """Return what tells a block from others by its cost: two of one kind do the same with inputs of one form,
        each with its own weights, and are counted once (`hpdm_core.training.cost`). By default every block is of its
        own.
        """
        return block
