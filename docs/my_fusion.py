"""Context as one mean token of the nearest parent, let in more the noisier the child is."""

import torch

from hpdm_core import ContextFusion, hookimpl


class MeanToken(ContextFusion):
    def __init__(self, shape, *, strength: float = 1.0):
        super().__init__()
        self.strength = strength
        self.map = torch.nn.Linear(shape.token_dim, shape.token_dim)

    def token_context(self, block, level, coords, sources):
        return self.map(sources[-1].tokens.mean(dim=1))  # [B, D]

    def fuse(self, block, level, tokens, context, coords, sigma):
        gate = self.strength * sigma / (1 + sigma)  # [B], 0 without noise, near strength in much of it
        return tokens + (gate[:, None] * context)[:, None]


@hookimpl
def register_context_fusions(register):
    register("mean_token", MeanToken, source="an example: docs/writing-a-plugin.md")
