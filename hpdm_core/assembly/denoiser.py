"""A network as a denoiser in data units, for sampling and the held-out loss.

It combines three parts that must match: the network's input scaling, the objective's decoder, and sigma_in per
level. It runs without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from hpdm_core.diffusion import Objective, network_input
from hpdm_core.model.hpdm import HPDM, Contexts, Encoded, Patches
from hpdm_core.pyramid import Coords

__all__ = ["Denoiser"]


class Denoiser:
    """``model`` under ``objective``, with ``sigma_in[level]`` the input scale of each level.

    ``compiled``: calls of the denoiser, which is run on every tile at each step, use torch.compile, with two graphs
    per level (with latents and without). `encode` and `contexts` are not compiled.
    """

    def __init__(
        self, model: HPDM, objective: Objective, sigma_in: Sequence[float], *, compiled: bool = False
    ) -> None:
        self.model = model
        self.objective = objective
        self.sigma_in = tuple(sigma_in)
        self._step: Callable[..., tuple[Tensor, Tensor]] = self._estimate
        if compiled:
            # Graphs per level: with latents and without, and both again for another number of rows. The limits are
            # raised for each denoiser, because all denoisers of the process share this code and its limits.
            graphs = 4 * len(self.sigma_in)
            torch._dynamo.config.cache_size_limit += graphs
            torch._dynamo.config.accumulated_cache_size_limit += graphs
            self._step = torch.compile(self._estimate, fullgraph=True)

    @torch.no_grad()
    def encode(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        sources: Sequence[Encoded],
        *,
        blocks: Collection[int] | None = None,
    ) -> Encoded:
        """Return noisy patches z [B, C, F, H, W] of ``level`` as context for finer levels.

        There are two passes for self-conditioning; the second stops before the last of ``blocks`` (default: all
        blocks that run a child), whose inputs are returned. ``sources`` are the encoded parents of these patches,
        coarsest first, rows matching; sigma [B]; label int64 [B], -1 for none.
        """
        return self.model.encode(self._patches(level, z, sigma, coords, label, None), sources, blocks=blocks)

    @torch.no_grad()
    def contexts(self, level: int, coords: Coords, sources: Sequence[Encoded]) -> Contexts:
        """Return the contexts of patches at ``coords`` from their parents ``sources``, to be reused at every step."""
        return self.model.contexts(level, coords, sources)

    @torch.no_grad()
    def __call__(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        contexts: Contexts | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the denoised patches [B, C, F, H, W] in data units, and the latents for the next step.

        ``latents`` are those of the previous step; None at the first step and for a backbone without state. The
        estimate has the dtype of ``z``.
        """
        return self._step(level, z, sigma, coords, label, contexts, latents)

    def _estimate(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        contexts: Contexts | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        entry = self._patches(level, z, sigma, coords, label, latents)
        ((prediction, latents),) = self.model([entry], [contexts])
        decoded = self.objective.denoised(z, prediction.to(z.dtype), sigma.to(z.dtype), self.sigma_in[level])
        return decoded, latents

    def _patches(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        latents: Tensor | None,
    ) -> Patches:
        scaled = network_input(z, sigma, self.sigma_in[level])
        weight = self.model.output.weight
        return Patches(
            level=level,
            noisy=scaled.to(weight.dtype),
            sigma=sigma.to(weight.dtype),
            coords=coords,
            label=label,
            latents=latents,
        )
