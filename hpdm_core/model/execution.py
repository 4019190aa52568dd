"""How the blocks of a backbone are run: precision of their matrix products, and what is kept for the backward
pass. Choices of a machine, not of a model: weights and results mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hpdm_core.model.backbone import Backbone

__all__ = ["Execution"]


@dataclass(frozen=True)
class Execution:
    """``matmul_dtype``: what the blocks' matrix products and attention take and give (None: as the weights
    are); ``attention_dtype``: the same for scaled_dot_product_attention alone, where it is to be another one;
    ``checkpointing``: keep only a block's inputs, and run it again in the backward pass.

    With bfloat16 the residual streams of tokens and latents, norms, and the sums inside softmax and products
    stay float32, and so does everything outside the blocks: tokenizer, fusion, embeddings and output.
    """

    matmul_dtype: torch.dtype | None = None
    attention_dtype: torch.dtype | None = None
    checkpointing: bool = False

    def run(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block, as `Backbone.run` does."""
        if self.checkpointing and torch.is_grad_enabled():
            updated: tuple[Tensor, Tensor | None] = checkpoint(
                self._cast, backbone, block, tokens, latents, condition, use_reentrant=False
            )
            return updated
        return self._cast(backbone, block, tokens, latents, condition)

    def _cast(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.matmul_dtype is None:
            return self._attend(backbone, block, tokens, latents, condition)
        with torch.autocast(tokens.device.type, dtype=self.matmul_dtype):
            made, read = self._attend(backbone, block, tokens, latents, condition)
        # A backbone of somebody's own may end with a product instead of a sum.
        return made.to(tokens.dtype), None if read is None or latents is None else read.to(latents.dtype)

    def _attend(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.attention_dtype is None:
            return backbone.run(block, tokens, latents, condition)
        with _AttentionIn(self.attention_dtype):
            return backbone.run(block, tokens, latents, condition)


class _AttentionIn(TorchFunctionMode):
    """Within the block fused attention, whoever calls it, works in ``dtype`` and returns its inputs' type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        with torch.autocast(query.device.type, enabled=False):
            made = func(*map(self._cast, args), **{name: self._cast(each) for name, each in kwargs.items()})
        return made.to(query.dtype)

    def _cast(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if real else value  # a mask of booleans stays one
