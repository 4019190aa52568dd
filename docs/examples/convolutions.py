"""A backbone without attention: a convolution of each channel over the tokens' grid, then an MLP per token."""

from typing import Literal

from torch import nn

from hpdm_core import hookimpl
from hpdm_core.model.backbone import Backbone


class Convolutions(Backbone):
    def __init__(self, token_dim, blocks, grid, *, kernel: Literal[3, 5] = 3):
        super().__init__()
        d, self.grid = token_dim, grid
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv3d(d, d, kernel, padding="same", groups=d) for _ in range(blocks))
        mlps = (nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(blocks))
        self.mlps = nn.ModuleList(mlps)

    def start(self, previous, batch):
        return None  # no latents

    def run(self, block, tokens, latents, condition):
        norm, conv, mlp = self.norms[block], self.convs[block], self.mlps[block]
        x = norm(tokens + condition.sum(dim=1, keepdim=True))  # [B, N, D]
        mixed = conv(x.mT.unflatten(2, self.grid)).flatten(2).mT
        return tokens + mlp(mixed), None


@hookimpl
def register_backbones(register):
    register("convolutions", Convolutions, source="an example: docs/examples.md")
