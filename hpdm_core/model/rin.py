"""Recurrent interface network: blocks that read tokens into latents, process, and write back.

RIN (2212.11972) with the block order of Snap Video (2402.14797): condition read + MLP, patch read + MLP,
self-attention layers, patch write + token MLP. Conditioning enters as tokens, not as modulation. The paper does
not print the widths; ours are chosen to match the parameter counts of HPDM's Table 8 (see docs).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.model.backbone import Backbone
from hpdm_core.model.layers import MLP, Attention, LayerNorm, Table

__all__ = ["RIN", "RINBlock"]

Positive = Annotated[int, Field(gt=0)]


class Gather(nn.Module):
    """x += Attention(LN(x), LN(source)); x += MLP(LN(x)). ``source_width`` None: self-attention, with one norm."""

    def __init__(
        self, width: int, source_width: int | None, *, heads: int, head_dim: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.query_norm = LayerNorm(width)
        self.source_norm = None if source_width is None else LayerNorm(source_width)
        self.attention = Attention(
            width, width if source_width is None else source_width, heads=heads, head_dim=head_dim
        )
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width, ratio=mlp_ratio)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Update x [B, N, width] from ``source`` [B, K, source width], or from itself."""
        query = self.query_norm(x)
        if self.source_norm is None:
            keys = query
        elif source is not None:
            keys = self.source_norm(source)
        else:
            raise ValueError("no source was given; this layer attends to a source")
        x = x + self.attention(query, keys)
        updated: Tensor = x + self.mlp(self.mlp_norm(x))
        return updated


class RINBlock(nn.Module):
    """One block: condition read, patch read, latent layers, patch write."""

    def __init__(
        self,
        token_dim: int,
        latent_dim: int,
        *,
        heads: int,
        latent_layers: int,
        latent_heads: int,
        latent_head_dim: int,
        latent_mlp_ratio: int,
        token_mlp_ratio: int,
    ) -> None:
        super().__init__()
        head_dim = token_dim // heads
        self.condition_read = Gather(
            latent_dim, token_dim, heads=heads, head_dim=head_dim, mlp_ratio=latent_mlp_ratio
        )
        self.patch_read = Gather(
            latent_dim, token_dim, heads=heads, head_dim=head_dim, mlp_ratio=latent_mlp_ratio
        )
        self.process = nn.ModuleList(
            Gather(latent_dim, None, heads=latent_heads, head_dim=latent_head_dim, mlp_ratio=latent_mlp_ratio)
            for _ in range(latent_layers)
        )
        self.patch_write = Gather(
            token_dim, latent_dim, heads=heads, head_dim=head_dim, mlp_ratio=token_mlp_ratio
        )

    def forward(self, tokens: Tensor, latents: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the updated (tokens [B, N, D], latents [B, M, E]); condition [B, K, D]."""
        latents = self.condition_read(latents, condition)
        latents = self.patch_read(latents, tokens)
        for layer in self.process:
            latents = layer(latents)
        return self.patch_write(tokens, latents), latents


class RIN(Backbone):
    """``blocks`` RIN blocks over tokens of width ``token_dim``, with latent self-conditioning.

    The inner width of the latents' self-attention is ``latent_heads * latent_head_dim``, independent of
    ``latent_dim``; reads and writes have inner width ``token_dim``, split into ``heads`` heads. The defaults are
    HPDM-S; ``latent_dim`` 512 and 1024 are M and L. Raises `InputError` if ``heads`` does not divide
    ``token_dim``.
    """

    def __init__(
        self,
        token_dim: int,
        blocks: int,
        *,
        latent_dim: Positive = 256,
        latents: Positive = 768,
        latent_layers: Positive = 4,
        latent_heads: Positive = 24,
        latent_head_dim: Positive = 128,
        heads: Positive = 16,
        latent_mlp_ratio: Positive = 4,
        token_mlp_ratio: Positive = 2,
    ) -> None:
        super().__init__()
        if token_dim % heads:
            raise InputError(
                f"model.backbone.heads: {heads} does not divide model.token_dim {token_dim}; "
                f"allowed is a divisor of it"
            )
        self.latents = Table(latents, latent_dim)
        self.recall_norm = LayerNorm(latent_dim)
        self.recall = MLP(latent_dim, ratio=4)
        self.recall_gain = LayerNorm(latent_dim, gain=0.0)
        self.blocks = nn.ModuleList(
            RINBlock(
                token_dim,
                latent_dim,
                heads=heads,
                latent_layers=latent_layers,
                latent_heads=latent_heads,
                latent_head_dim=latent_head_dim,
                latent_mlp_ratio=latent_mlp_ratio,
                token_mlp_ratio=token_mlp_ratio,
            )
            for _ in range(blocks)
        )

    def start(self, previous: Tensor | None, batch: int) -> Tensor:
        """Return Z = Z_init + LN0(Z' + MLP(LN(Z'))); gain and bias of LN0 start at 0; None: Z' = 0."""
        initial: Tensor = self.latents()
        recalled = torch.zeros_like(initial)[None] if previous is None else previous
        latents: Tensor = initial + self.recall_gain(recalled + self.recall(self.recall_norm(recalled)))
        return latents.expand(batch, -1, -1)

    def run(
        self, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Backbone`."""
        return cast(tuple[Tensor, Tensor], self.blocks[block](tokens, latents, condition))

    def kind(self, block: int) -> Hashable:
        """See `Backbone`: all blocks are alike."""
        return "block"
