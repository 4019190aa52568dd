"""The parts of one cell, built from its configuration. This is the only place where names of parts become objects.

Training, sampling and evaluation take an `Assembly`. Parts are built on first use and kept as plain objects, so that
access to them costs nothing in inner loops.
"""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hpdm_core.assembly.denoiser import Denoiser
from hpdm_core.assembly.runtime import compiler_problem, execution_of, state_dtype
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import keyed_global_rng
from hpdm_core.config.schema import Arithmetic, CellConfig
from hpdm_core.model.counting import Counter
from hpdm_core.model.fusion import FusionShape
from hpdm_core.model.hpdm import HPDM
from hpdm_core.model.initialise import initialise
from hpdm_core.pyramid import Pyramid

if TYPE_CHECKING:
    from hpdm_core.data.dataset import ClipDataset
    from hpdm_core.diffusion import NoiseSampler, Objective
    from hpdm_core.model.backbone import Backbone
    from hpdm_core.plugins import Plugins
    from hpdm_core.pyramid import CoordinateSampler
    from hpdm_core.solver import Solver

__all__ = ["Assembly"]

log = logging.getLogger(__name__)


class Assembly:
    """The parts of the cell that ``config`` describes, found among ``plugins``."""

    def __init__(self, config: CellConfig, plugins: Plugins) -> None:
        self.config = config
        self.plugins = plugins

    @cached_property
    def pyramid(self) -> Pyramid:
        """Levels, sizes and coordinates."""
        model = self.config.model
        return Pyramid(
            video=model.video,
            patch=model.patch,
            token=model.token,
            levels=model.levels,
            channels=model.channels,
        )

    @cached_property
    def levels_per_block(self) -> tuple[int, ...]:
        """How many levels each block runs: at least 1, never decreasing, L in the last block (paper, section 4.3)."""
        model = self.config.model
        part = model.computation_allocation
        made = tuple(self.plugins.make("computation_allocations", part, model.blocks, model.levels))
        allowed = (
            len(made) == model.blocks
            and all(1 <= count <= model.levels for count in made)
            and list(made) == sorted(made)
            and made[-1] == model.levels
        )
        if not allowed:
            raise InputError(
                f"model.computation_allocation: '{part.use}' gives {list(made)}; allowed is one number for each of "
                f"the {model.blocks} blocks, at least 1, never decreasing, and {model.levels} (all levels) in the last"
            )
        return made

    @cached_property
    def fusion_shape(self) -> FusionShape:
        """The sizes that a context fusion is built from."""
        model = self.config.model
        return FusionShape(
            token_dim=model.token_dim,
            grid=self.pyramid.grid,
            patch=self.pyramid.patch,
            levels_per_block=self.levels_per_block,
            channels=model.channels,
        )

    @cached_property
    def sigma_in(self) -> tuple[float, ...]:
        """Input scale per level."""
        part = self.config.diffusion.noise_scaling
        levels = self.config.model.levels
        made = tuple(float(value) for value in self.plugins.make("noise_scalings", part, levels))
        if len(made) != levels or not all(value > 0 for value in made):
            raise InputError(
                f"diffusion.noise_scaling: '{part.use}' gives {list(made)}; allowed is one positive number for each "
                f"of the {levels} levels"
            )
        return made

    @cached_property
    def objective(self) -> Objective:
        """Target, decoder and loss weight."""
        made: Objective = self.plugins.make("objectives", self.config.diffusion.objective)
        return made

    @cached_property
    def noise_sampler(self) -> NoiseSampler:
        """Chooses the entries of a training step and their sigmas."""
        made: NoiseSampler = self.plugins.make(
            "noise_samplers", self.config.diffusion.noise_sampling, self.sigma_in
        )
        return made

    @cached_property
    def coordinate_sampler(self) -> CoordinateSampler:
        """Draws the positions of training patches."""
        made: CoordinateSampler = self.plugins.make(
            "coordinate_samplers", self.config.training.coordinate_sampling, self.pyramid
        )
        return made

    @cached_property
    def solver(self) -> Solver:
        """The sampler that denoises a level."""
        made: Solver = self.plugins.make("solvers", self.config.sampling.solver, self.sigma_in)
        return made

    @cached_property
    def dataset(self) -> ClipDataset:
        """The source of clips. Building it may decode videos."""
        from hpdm_core.data.clip_cache import CachedReader
        from hpdm_core.data.dataset import ClipShape

        frames, height, width = self.config.model.video
        clip = ClipShape(frames=frames, height=height, width=width, channels=self.config.model.channels)
        reader = self.plugins.make("video_readers", self.config.data.reader)
        runtime = self.config.runtime
        if runtime.clip_cache is not None:
            limit = int(runtime.clip_cache_size * 2**30)
            reader = CachedReader(reader, runtime.clip_cache, limit=limit)
        made: ClipDataset = self.plugins.make("datasets", self.config.data.dataset, clip, reader)
        wanted, found = self.config.model.classes, len(made.classes)
        if wanted and found != wanted:  # with more, classes without clips would be trained and sampled
            raise InputError(
                f"model.classes: {wanted} was given, and data.dataset '{self.config.data.dataset.use}' has {found} "
                f"classes; allowed is {f'{found}, or ' if found else ''}0 for a model without labels"
            )
        return made

    def build_model(self, *, device: str | torch.device = "cpu") -> HPDM:
        """Return a new network on ``device`` with its initial weights, keyed by (seed, parameter name)."""
        model = self.config.model
        seed = self.config.seed
        with torch.device(device):
            with keyed_global_rng(seed, "model.backbone"):
                backbone: Backbone = self.plugins.make(
                    "backbones", model.backbone, model.token_dim, model.blocks, self.pyramid.grid
                )
                self._check_self_conditioning(backbone)
            with keyed_global_rng(seed, "model.context_fusion"):
                fusion = self.plugins.make("context_fusions", model.context_fusion, self.fusion_shape)
            diffusion = self.config.diffusion
            network = HPDM(
                model,
                backbone=backbone,
                fusion=fusion,
                levels_per_block=self.levels_per_block,
                pyramid=self.pyramid,
                sigma_range=(diffusion.sigma_min, diffusion.sigma_max),
            )
        if torch.device(device).type != "meta":
            initialise(network, seed=seed, table_std=model.table_std, zero_residual=model.zero_residual)
        return network

    @torch.no_grad()
    def _check_self_conditioning(self, backbone: Backbone) -> None:
        share = self.config.training.self_conditioning
        with Counter():  # without it, torch's meta kernels would load its compiler, which is slow
            latents = backbone.start(None, 1) if share else None
        if share and latents is None:
            raise InputError(
                f"training.self_conditioning: {share} of the videos would take latents from a first pass, and "
                f"model.backbone '{self.config.model.backbone.use}' has none; allowed is 0, or a backbone with latents"
            )

    def denoiser(self, model: HPDM, arithmetic: Arithmetic | None = None) -> Denoiser:
        """Return ``model`` as a denoiser in data units, with the precision of ``arithmetic``.

        None: the precision of ``sampling``, compiled if ``runtime.compile`` says so. The denoiser shares the weights of
        ``model``, unless they have to be converted to another dtype; then they are copied.
        """
        compiled = arithmetic is None and self.config.runtime.compile in (True, "sampling")
        arithmetic = arithmetic or self.config.sampling
        dtype = state_dtype(arithmetic)
        same = all(parameter.dtype == dtype for parameter in model.parameters())
        network = copy.copy(model) if same else copy.deepcopy(model).to(dtype)
        network.execution = execution_of(arithmetic)
        if compiled and (problem := compiler_problem(torch.device(self.config.runtime.device))) is not None:
            log.warning("runtime.compile: %s; sampling continues without compilation", problem)
            compiled = False
        return Denoiser(network, self.objective, self.sigma_in, compiled=compiled)

    def make(self, family: str, part: Any, *positional: Any) -> Any:
        """Build a part of any ``family``, such as a metric."""
        return self.plugins.make(family, part, *positional)
