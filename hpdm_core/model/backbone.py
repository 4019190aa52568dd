"""What the network asks of a backbone: blocks that update tokens through a latent state.

The backbone knows nothing of levels, patches or context: all active levels come folded into the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Base class of backbones, built as ``factory(token_dim, blocks, *, options)``."""

    def start(self, previous: Tensor | None, batch: int) -> Tensor:
        """Return the latents [B, M, E] that enter the first block.

        ``previous`` [B, M, E] are the latents that an earlier pass ended with (self-conditioning); None means
        zeros.
        """
        raise NotImplementedError

    def run(self, block: int, tokens: Tensor, latents: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Run one block: tokens [B, N, D], latents [B, M, E], condition [B, K, D] -> (tokens, latents)."""
        raise NotImplementedError
