"""How the blocks of a backbone are run: the precision of their matrix products, and activation checkpointing.

These settings depend on the machine, not on the model: the weights and the meaning of the results do not change.
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
    """Precision and checkpointing of the blocks.

    ``matmul_dtype``: the dtype of inputs and outputs of the blocks' matrix products and attention (None: the
    dtype of the weights). ``attention_dtype``: another dtype for scaled_dot_product_attention alone (None: the
    same). ``checkpointing``: keep only a block's inputs, and run it again in the backward pass.

    With bfloat16, the residual streams of tokens and latents, the norms, and the sums inside softmax and
    products stay float32, and so does everything outside the blocks: tokenizer, fusion, embeddings and output.
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
        # A plugin's backbone may end with a matrix product, whose result has the lower precision.
        return made.to(tokens.dtype), None if read is None or latents is None else read.to(latents.dtype)

    def _attend(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.attention_dtype is None:
            return backbone.run(block, tokens, latents, condition)
        with _AttentionIn(self.attention_dtype):
            return backbone.run(block, tokens, latents, condition)


class _AttentionIn(TorchFunctionMode):
    """Within the block, every call of scaled_dot_product_attention runs in ``dtype`` and returns its input's dtype."""

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
        return value.to(self.dtype) if real else value  # a boolean mask is not cast
