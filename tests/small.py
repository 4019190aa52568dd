"""The tiny configurations that many tests share: networks of a few thousand weights, which train in seconds."""

from __future__ import annotations

from typing import Any

__all__ = ["MODEL", "rin"]

MODEL = """
model:
  {video: [4, 16, 16], patch: [2, 4, 4], token: [1, 2, 2], levels: 2, token_dim: 16, blocks: 2, backbone: {
   use: rin, latent_dim: 16, latents: 4, latent_layers: 1, latent_heads: 2, latent_head_dim: 8, heads: 2,
   latent_mlp_ratio: 2, token_mlp_ratio: 2}}
"""
"""The model of a study file: two levels of videos of 4x16x16."""


def rin(
    latent_dim: int = 16,
    *,
    latents: int = 4,
    latent_layers: int = 1,
    latent_heads: int = 2,
    latent_head_dim: int | None = None,
    heads: int = 2,
) -> dict[str, Any]:
    """Return the options of a small RIN, as they stand in a study file; heads of the latents share their width."""
    return {
        "use": "rin",
        "latent_dim": latent_dim,
        "latents": latents,
        "latent_layers": latent_layers,
        "latent_heads": latent_heads,
        "latent_head_dim": latent_dim // latent_heads if latent_head_dim is None else latent_head_dim,
        "heads": heads,
    }
