"""Backbones: what runs the blocks (HPDM builds on RIN, 2212.11972)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.model.rin import RIN

__all__ = ["rin"]

Positive = Annotated[int, Field(gt=0)]


def rin(
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
) -> RIN:
    """Recurrent interface network; the defaults are HPDM-S, ``latent_dim`` 512 and 1024 are M and L."""
    return RIN(
        token_dim,
        blocks,
        latent_dim=latent_dim,
        latents=latents,
        latent_layers=latent_layers,
        latent_heads=latent_heads,
        latent_head_dim=latent_head_dim,
        heads=heads,
        latent_mlp_ratio=latent_mlp_ratio,
        token_mlp_ratio=token_mlp_ratio,
    )


@hookimpl
def register_backbones(register: Register) -> None:
    """Add the built-in backbones."""
    register("rin", rin, source="RIN (2212.11972), Snap Video (2402.14797), widths fitted to HPDM's Table 8")
