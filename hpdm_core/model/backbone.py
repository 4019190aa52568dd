"""The interface of backbones: blocks that update tokens, with or without a latent state.

A backbone does not handle levels, patches or context: all active levels are folded into the batch.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Base class of backbones, built as ``factory(token_dim, blocks, *, options)``.

    A factory with a third positional parameter, ``grid``, also gets the number of tokens of a patch per axis
    (f, h, w). A backbone without latent state returns None from `start` and gets None as latents in every
    block. Self-conditioning then has nothing to pass on, and the network runs no first pass.
    """

    def start(self, previous: Tensor | None, batch: int) -> Tensor | None:
        """Return the latents [B, M, E] that enter the first block, or None for a backbone without state.

        ``previous`` [B, M, E] are the final latents of an earlier pass (self-conditioning); None means zeros.
        Whether the result is None must not depend on the arguments.
        """
        raise NotImplementedError

    def run(
        self, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block: tokens [B, N, D], latents [B, M, E], condition [B, K, D] -> (tokens, latents).

        Tokens are row-major over the grid (f, h, w). Latents are None, in and out, if `start` returned None.
        """
        raise NotImplementedError

    def kind(self, block: int) -> Hashable:
        """Return a key that is equal for blocks of equal cost: they do the same operations, with their own weights.

        `hpdm_core.training.cost` counts the operations of one block per key. By default every block has its own key.
        """
        return block
