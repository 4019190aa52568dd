"""Embeddings of the network's inputs besides pixels: noise level, pyramid level, class, and position in the patch.

All embeddings have the token width D. The noise level is embedded as in RIN: a sinusoid of the logarithm of
sigma, normalised over its features, then a two-layer MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpdm_core.model.layers import LevelTable, Linear, Table
from hpdm_core.pyramid import Triple

__all__ = ["ClassEmbedding", "PositionEmbedding", "SigmaEmbedding", "sinusoid"]

FEATURES = 256
PERIOD = 10_000.0
SMALLEST = 1e-3
"""Noise levels below this fraction of sigma_min, including zero, are embedded as this fraction of sigma_min."""


def sinusoid(values: Tensor, features: int) -> Tensor:
    """Return sines and cosines [B, features] of ``values`` [B], each row normalised to mean 0 and std 1."""
    half = features // 2
    steps = torch.arange(half, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(steps * (-math.log(PERIOD) / half))
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1)
    centred = codes - codes.mean(dim=-1, keepdim=True)
    return centred / centred.square().mean(dim=-1, keepdim=True).sqrt()


class SigmaEmbedding(nn.Module):
    """The noise level and the level of the pyramid as one vector [B, D].

    tau = (ln sigma - ln sigma_min) / (ln sigma_max - ln sigma_min); sinusoid(1000 tau) of 256 features ->
    Linear -> SiLU -> Linear, plus a learned vector per level (level 0 gets no coordinates from which the network
    could infer its scale).
    """

    def __init__(self, width: int, *, levels: int, sigma_range: tuple[float, float]) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_range
        self.up = Linear(FEATURES, width)
        self.down = Linear(width, width)
        self.levels = LevelTable(levels, width)

    def forward(self, sigma: Tensor, level: int) -> Tensor:
        """Embed sigma [B] at ``level``."""
        log_min, log_max = math.log(self.sigma_min), math.log(self.sigma_max)
        wide = torch.promote_types(sigma.dtype, torch.float32)
        logs = sigma.to(wide).clamp(min=SMALLEST * self.sigma_min).log()
        codes = sinusoid(1000 * (logs - log_min) / (log_max - log_min), FEATURES)
        embedded: Tensor = self.down(F.silu(self.up(codes.to(self.up.weight.dtype))))
        vectors: Tensor = self.levels()
        return embedded + vectors[level]


class ClassEmbedding(nn.Module):
    """A learned vector per class [B, D]; a row without label (-1) gets zeros."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = Table(classes, width)

    def forward(self, label: Tensor) -> Tensor:
        """Embed label [B], int64, -1 for none."""
        rows: Tensor = self.table()
        return rows[label.clamp(min=0)] * (label >= 0)[:, None].to(rows.dtype)


class PositionEmbedding(nn.Module):
    """Learned position of a token in its patch, the sum of a table per axis: [N, D], row-major (f, h, w)."""

    def __init__(self, grid: Triple, width: int) -> None:
        super().__init__()
        frames, height, width_ = grid
        self.f = Table(frames, width)
        self.h = Table(height, width)
        self.w = Table(width_, width)

    def forward(self) -> Tensor:
        """Return the position embedding of every token of a patch."""
        f, h, w = self.f(), self.h(), self.w()
        codes: Tensor = f[:, None, None] + h[None, :, None] + w[None, None, :]
        return rearrange(codes, "f h w d -> (f h w) d")
