"""Three fusions that the project does not ship, each built on another idea: the contract must hold them all.

A plugin file like anyone's: it is named by its path, and imports nothing that a plugin outside could not.
"""

import math

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from hpdm_core import ContextFusion, hookimpl


class CrossAttention(ContextFusion):
    """A child's tokens attend to all tokens of all parents; keys carry places around the child."""

    def __init__(self, shape, *, width: int = 8):
        super().__init__()
        self.grid = shape.grid
        self.query = nn.ModuleDict({str(b): nn.Linear(shape.token_dim, width) for b in shape.fused_blocks})
        self.entry = nn.ModuleDict(
            {str(b): nn.Linear(shape.token_dim + 3, 2 * width) for b in shape.fused_blocks}
        )
        self.out = nn.ModuleDict({str(b): nn.Linear(width, shape.token_dim) for b in shape.fused_blocks})

    def token_context(self, block, level, coords, sources):
        middle = 2 * (coords.offset + coords.scale / 2) - 1  # [B, 3]
        entries = []
        for source in sources:
            places = (source.coords.centres(self.grid) - middle[:, :, None]).transpose(1, 2)  # [B, N, 3]
            entries.append(torch.cat([source.tokens, places.to(source.tokens.dtype)], dim=-1))
        return self.entry[str(block)](torch.cat(entries, dim=1))  # [B, level * N, 2 width]: keys and values

    def fuse(self, block, level, tokens, context, coords, sigma):
        keys, values = context.chunk(2, dim=-1)
        read = scaled_dot_product_attention(self.query[str(block)](tokens), keys, values)
        return tokens + self.out[str(block)](read)


class SigmaGate(ContextFusion):
    """The parents' mean token, added as far as the child is noisier than its parents."""

    def __init__(self, shape, *, sharpness: float = 1.0):
        super().__init__()
        self.maps = nn.ModuleDict(
            {str(b): nn.Linear(shape.token_dim, shape.token_dim) for b in shape.fused_blocks}
        )
        self.threshold = nn.Parameter(torch.zeros(len(shape.levels_per_block)))
        self.sharpness = sharpness

    def token_context(self, block, level, coords, sources):
        mean = torch.stack([source.tokens.mean(1) for source in sources]).mean(0)
        noise = torch.stack([source.sigma.clamp(min=1e-4).log() for source in sources]).mean(0)
        return torch.cat([self.maps[str(block)](mean), noise[:, None]], dim=-1)  # [B, D + 1]

    def fuse(self, block, level, tokens, context, coords, sigma):
        excess = sigma.clamp(min=1e-4).log() - context[:, -1] - self.threshold[block]
        gate = torch.sigmoid(self.sharpness * excess)
        return tokens + (gate[:, None] * context[:, :-1])[:, None]


class FrequencySplit(ContextFusion):
    """The nearest parent's pixels under the child, in low and high frequencies, beside its own."""

    reads_tokens = False

    def __init__(self, shape, *, pool: int = 2):
        super().__init__()
        self.extra_channels = 2 * shape.channels
        self.patch = shape.patch
        self.pool = pool

    def pixel_context(self, level, coords, sources):
        parent = sources[-1]
        f, h, w = (2 * axis - 1 for axis in coords.within(parent.coords, self.patch))  # each [B, cells]
        full = (len(f), *self.patch)
        axes = (w[:, None, None, :], h[:, None, :, None], f[:, :, None, None])
        grid = torch.stack([axis.expand(full) for axis in axes], dim=-1)
        pixels = nn.functional.grid_sample(parent.noisy, grid, padding_mode="border", align_corners=False)
        small = [math.ceil(size / self.pool) for size in self.patch]
        low = interpolate(nn.functional.adaptive_avg_pool3d(pixels, small), self.patch, mode="trilinear")
        return torch.cat([low, pixels - low], dim=1)


@hookimpl
def register_context_fusions(register):
    register("cross_attention", CrossAttention, source="Vaswani et al. 2017, used on parents' tokens")
    register("sigma_gate", SigmaGate, source="a gate by noise level")
    register("frequency_split", FrequencySplit, source="a Laplacian pyramid of one step")
