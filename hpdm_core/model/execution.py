"""How the blocks of a backbone are run: precision of their matrix products, and what is kept for the backward
pass. Choices of a machine, not of a model: weights and results mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpdm_core.model.backbone import Backbone

__all__ = ["Execution"]


@dataclass(frozen=True)
class Execution:
    """``matmul_dtype``: what the blocks' matrix products and attention take and give (None: as the weights
    are); ``checkpointing``: keep only a block's inputs, and run it again in the backward pass.

    With bfloat16 the residual streams of tokens and latents, norms, and the sums inside softmax and products
    stay float32, and so does everything outside the blocks: tokenizer, fusion, embeddings and output.
    """

    matmul_dtype: torch.dtype | None = None
    checkpointing: bool = False

    def run(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run one block, as `Backbone.run` does."""
        if self.checkpointing and torch.is_grad_enabled():
            updated: tuple[Tensor, Tensor] = checkpoint(
                self._cast, backbone, block, tokens, latents, condition, use_reentrant=False
            )
            return updated
        return self._cast(backbone, block, tokens, latents, condition)

    def _cast(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.matmul_dtype is None:
            return backbone.run(block, tokens, latents, condition)
        with torch.autocast(tokens.device.type, dtype=self.matmul_dtype):
            made, read = backbone.run(block, tokens, latents, condition)
        # A backbone of somebody's own may end with a product instead of a sum.
        return made.to(tokens.dtype), read.to(latents.dtype)
