"""The backbone `dit`: a transformer with full attention over a patch's tokens, conditioned by modulation, no latents.

DiT (Peebles & Xie, 2212.09748) with adaLN-zero. Its layers have the initial values of RIN
(`hpdm_core.model.layers`). Position embeddings in attention are rotary (RoFormer, 2104.09864) along each of the three
axes of the token grid, like those of RoPE-ViT (2403.13298) along two.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.model.backbone import Backbone
from hpdm_core.model.layers import EPSILON, LayerNorm, Linear
from hpdm_core.pyramid import Triple

__all__ = ["DiT", "DiTBlock", "register_backbones", "rotated", "rotations"]

Positive = Annotated[int, Field(gt=0)]

BASE = 100.0
"""Per cell, the slowest pair of an axis is rotated by almost ``1 / BASE`` radians, the fastest by 1 radian."""


def rotations(grid: Triple, pairs: int) -> Tensor:
    """Return cosines and sines [2, N, pairs] of the angles by which each token's channel pairs are rotated.

    The pairs are divided evenly among the axes with more than one cell. Pair i of n of an axis is rotated by the
    token's index on this axis times ``BASE ** (-i / n)`` radians. Pairs that are left over are not rotated. N is
    row-major over (f, h, w).
    """
    axes = [axis for axis, size in enumerate(grid) if size > 1]
    each = pairs // max(len(axes), 1)
    speeds = BASE ** (-torch.arange(each) / each)
    angles = torch.zeros(*grid, pairs)
    for number, axis in enumerate(axes):
        turned = torch.arange(grid[axis])[:, None] * speeds  # [cells, each]
        shape = [grid[axis] if other == axis else 1 for other in range(3)]
        angles[..., number * each : (number + 1) * each] = turned.view(*shape, each)
    angles = angles.flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Return queries or keys x [..., N, 2 * pairs] with channels (i, i + pairs) rotated by ``turns``; dtype as x.

    Products of rotated queries and keys depend on positions only through their difference.
    """
    cosine, sine = turns
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1).to(x.dtype)


class DiTBlock(nn.Module):
    """x += gate * Attention(modulated LN(x)); x += gate * MLP(modulated LN(x)); these norms have no learned parameters.

    Shift, scale and gate of both come from SiLU(condition) through a Linear(D -> 6D) and a layer norm whose
    gain and bias start at 0, so that the block starts as the identity. In DiT the Linear itself starts at 0; LAMB,
    which moves a matrix by a share of its norm, would never change it.
    """

    def __init__(self, width: int, *, heads: int, mlp_ratio: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Linear(width, 6 * width)
        self.modulation_gain = LayerNorm(6 * width, gain=0.0)
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.o = Linear(width, width)
        self.q_norm = LayerNorm(width // heads) if qk_norm else None
        self.k_norm = LayerNorm(width // heads) if qk_norm else None
        self.up = Linear(width, mlp_ratio * width)
        self.down = Linear(mlp_ratio * width, width)

    def forward(self, tokens: Tensor, condition: Tensor, turns: Tensor | None) -> Tensor:
        """Return the tokens [B, N, D]; condition [B, D]; ``turns`` see `rotations`, None for no positions."""
        made = self.modulation_gain(self.modulation(F.silu(condition)))[:, None]  # [B, 1, 6D]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = made.chunk(6, dim=-1)
        tokens = tokens + gate * self._attend(_modulated(tokens, shift, scale), turns)
        hidden = F.gelu(self.up(_modulated(tokens, mlp_shift, mlp_scale)))
        updated: Tensor = tokens + mlp_gate * self.down(hidden)
        return updated

    def _attend(self, x: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(made(x), "b n (heads d) -> b heads n d", heads=self.heads) for made in self._maps()
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        gathered = F.scaled_dot_product_attention(q, k, v)  # scale 1/sqrt(head width)
        merged: Tensor = self.o(rearrange(gathered, "b heads n d -> b n (heads d)"))
        return merged

    def _maps(self) -> tuple[Linear, Linear, Linear]:
        return self.q, self.k, self.v


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class DiT(Backbone):
    """``blocks`` DiT blocks over tokens of width ``token_dim`` on ``grid``, conditioned on the sum of the condition
    tokens.

    ``rotary``: rotary position embeddings; False leaves only the position embedding that the network adds to its
    tokens. ``qk_norm``: a layer norm on each head's queries and keys. ``model.zero_residual`` does not change these
    blocks: their gates start at zero already, and a gate and a linear layer that both start at zero would get no
    gradient. Raises `InputError` if ``heads`` does not divide the width, or heads are too narrow for the rotations.
    """

    turns: Tensor | None

    def __init__(
        self,
        token_dim: int,
        blocks: int,
        grid: Triple,
        *,
        heads: Positive = 16,
        mlp_ratio: Positive = 4,
        rotary: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if token_dim % heads:
            raise InputError(
                f"model.backbone.heads: {heads} does not divide model.token_dim {token_dim}; "
                f"allowed is a divisor of it"
            )
        width, axes = token_dim // heads, sum(size > 1 for size in grid)
        if rotary and axes and (width % 2 or width < 2 * axes):
            raise InputError(
                f"model.backbone.heads: {heads} heads of model.token_dim {token_dim} have {width} channels each; "
                f"allowed with rotary positions on {axes} axes is an even number of {2 * axes} or more"
            )
        turns = rotations(grid, width // 2) if rotary and axes else None
        self.register_buffer("turns", turns, persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(token_dim, heads=heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm) for _ in range(blocks)
        )

    def start(self, previous: Tensor | None, batch: int) -> None:
        """Return None, because this backbone has no latent state."""

    def run(
        self, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, None]:
        """See `Backbone`."""
        return self.blocks[block](tokens, condition.sum(dim=1), self.turns), None


@hookimpl
def register_backbones(register: Register) -> None:
    """Add dit."""
    register(
        "dit",
        DiT,
        source="DiT (2212.09748): adaLN-zero; rotary positions of RoPE-ViT (2403.13298) on three axes",
    )
