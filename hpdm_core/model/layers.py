"""The layers of the network. Each can draw the initial values of its own parameters.

Initial values follow the official RIN code: Glorot-uniform weights, zero biases, truncated normal tables of
standard deviation 0.02. A layer draws them when it is built (from torch's global generator) and again, keyed
by its name in the network, through `Initialised.initial` (see `hpdm_core.model.initialise`).
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["MLP", "Attention", "Initialised", "LayerNorm", "LevelTable", "Linear", "Table"]

EPSILON = 1e-6
TABLE_STD = 0.02
FEW_KEYS = 128
"""Up to this number, the keys and values of a head stay in a core's cache in any memory layout."""


@runtime_checkable
class Initialised(Protocol):
    """A module whose own parameters can be drawn from a keyed generator."""

    def initial(self, name: str, generator: torch.Generator | None) -> Tensor:
        """Return the initial value (CPU, float32) of the module's own parameter ``name``; None = global generator."""
        ...


class Linear(nn.Linear):
    """Affine map; Glorot-uniform weights, zero bias."""

    def reset_parameters(self) -> None:
        """Draw the initial values from the global generator (called by the constructor)."""
        if self.weight.is_meta:
            return  # nothing to draw; cost counting builds many models on the meta device
        with torch.no_grad():
            self.weight.copy_(self.initial("weight", None))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial(self, name: str, generator: torch.Generator | None) -> Tensor:
        """See `Initialised`."""
        if name == "bias":
            return torch.zeros(self.out_features, device="cpu")
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        weight = torch.empty(self.out_features, self.in_features, device="cpu")
        return weight.uniform_(-bound, bound, generator=generator)


class LayerNorm(nn.LayerNorm):
    """Layer norm with epsilon 1e-6; ``gain`` is the initial value of its scale."""

    def __init__(self, width: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(width, eps=EPSILON)

    def reset_parameters(self) -> None:
        """Set the initial values (called by the constructor)."""
        if self.weight.is_meta:
            return
        nn.init.constant_(self.weight, self.gain)
        nn.init.zeros_(self.bias)

    def initial(self, name: str, generator: torch.Generator | None) -> Tensor:
        """See `Initialised`."""
        value = self.gain if name == "weight" else 0.0
        return torch.full(tuple(self.normalized_shape), value, device="cpu")


class Table(nn.Module):
    """A learned table ``rows`` [*shape]; truncated normal start, standard deviation 0.02, cut at two of them."""

    rows: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(*shape))
        if not self.rows.is_meta:
            with torch.no_grad():
                self.rows.copy_(self.initial("rows", None))

    def initial(self, name: str, generator: torch.Generator | None) -> Tensor:
        """See `Initialised`."""
        rows = torch.empty(self.rows.shape, device="cpu")
        return nn.init.trunc_normal_(
            rows, std=TABLE_STD, a=-2 * TABLE_STD, b=2 * TABLE_STD, generator=generator
        )

    def forward(self) -> Tensor:
        """Return the table."""
        return self.rows


class LevelTable(Table):
    """A table with a row per level of the pyramid, coarsest first, [levels, width].

    ``training.start_from.resize: [levels]`` fills its first rows from a model with fewer levels.
    """


class MLP(nn.Module):
    """Linear, exact GELU, Linear: [..., width] -> [..., width] through ``ratio`` times the width."""

    def __init__(self, width: int, *, ratio: int) -> None:
        super().__init__()
        self.up = Linear(width, ratio * width)
        self.down = Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map every row independently."""
        hidden: Tensor = self.down(F.gelu(self.up(x)))
        return hidden


class Attention(nn.Module):
    """Multi-head attention with separate, biased query, key, value and output maps.

    The residual connection and the norms are outside this layer. Queries [B, N, query_dim], keys and values from
    [B, K, source_dim], inner width ``heads * head_dim``.
    """

    def __init__(self, query_dim: int, source_dim: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.q = Linear(query_dim, inner)
        self.k = Linear(source_dim, inner)
        self.v = Linear(source_dim, inner)
        self.o = Linear(inner, query_dim)

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        """Return the attention of ``query`` over ``source``: [B, N, query_dim]."""
        q, k, v = (self._split(made) for made in (self.q(query), self.k(source), self.v(source)))
        if k.is_cpu and k.shape[-2] > FEW_KEYS:  # the CPU kernel reads them again for every block of queries
            k, v = k.contiguous(), v.contiguous()
        gathered = F.scaled_dot_product_attention(q, k, v)  # scale 1/sqrt(head_dim)
        merged: Tensor = self.o(rearrange(gathered, "b heads n d -> b n (heads d)"))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads)
