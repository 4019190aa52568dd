"""The tiled cascade: levels are sampled one after the other, each as one noisy state that is denoised in tiles.

Paper, sections 4.4 and 5.1. At every step a level's state is cut into tiles, the tiles are denoised with their
parents as context, the results are averaged where they overlap, and the solver makes one step of the whole state
(as in MultiDiffusion, Bar-Tal et al. 2023). Parents are cut from the finished coarser levels, to which a little
noise is added: one noise field per video and level, so that the contexts of neighbouring tiles are consistent.

Every random number of video ``index`` comes from streams (seed, "sampling", index, level, i) and (seed,
"context_noise", index, level), so a video is the same in any batch, up to the rounding of batched matrix
products.

Shapes: n videos, C channels, F, H, W in pixels of the level; videos in [-1, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpdm_core.assembly.runtime import products_as_in, state_dtype
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.randomness import normal
from hpdm_core.sampling.cache import GIB, CachedContexts, FreshContexts, LevelContexts, NoContexts
from hpdm_core.sampling.parents import Ancestors, CascadeDenoiser
from hpdm_core.sampling.tiles import Layout, TileBatch, parent_by_parent, tile_batches
from hpdm_core.solver import Denoise

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.config.schema import RuntimeConfig

__all__ = ["Observe", "Progress", "label_of", "noised_parents", "sample", "tiled_denoise"]

Observe = Callable[[int, Tensor], None]
"""``observe(level, videos)``: called when a level of a batch is finished, videos [n, C, F, H, W] on the CPU."""

Progress = Callable[[dict[str, int]], None]
"""Called after each denoiser pass over a level, with the numbers ``videos`` (finished), ``of`` (all videos),
``level``, ``levels``, ``call`` and ``calls`` (denoiser passes on that level)."""


def label_of(index: int, classes: int) -> int:
    """Return the label of sample ``index``: the classes in turn, or -1 if there are none."""
    return index % classes if classes else -1


@torch.no_grad()
def sample(
    assembly: Assembly,
    denoiser: CascadeDenoiser,
    indices: Sequence[int],
    labels: Sequence[int],
    *,
    observe: Observe | None = None,
    given: Mapping[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return the videos ``indices`` with ``labels`` (-1 for none): per level a tensor [n, C, F_l, H_l, W_l], CPU.

    Videos are sampled ``runtime.sample_batch`` at a time. ``given`` maps levels to finished videos, which are used
    instead of sampling these levels, such as level 0 of a real clip.

    Raises:
        InputError: indices and labels differ in number, or a given level has a wrong size.
        TroubleError: a sampled level has values that are not finite.
    """
    config = assembly.config
    if len(indices) != len(labels):
        raise InputError(f"{len(indices)} samples with {len(labels)} labels; allowed is one label per sample")
    given = dict(given or {})
    for level, videos in given.items():
        if not 0 <= level < config.model.levels:
            raise InputError(f"given level {level}; allowed is 0 to {config.model.levels - 1}")
        wanted = (len(indices), config.model.channels, *assembly.pyramid.size(level))
        if tuple(videos.shape) != wanted:
            raise InputError(f"given level {level} has shape {tuple(videos.shape)}; allowed is {wanted}")

    finished: list[list[Tensor]] = [[] for _ in range(config.model.levels)]
    size = config.runtime.sample_batch
    for start in range(0, len(indices), size):
        batch = slice(start, start + size)

        def report(numbers: dict[str, int], done: int = start) -> None:
            if progress is not None:
                progress({"videos": done, "of": len(indices), **numbers})

        with products_as_in(config.sampling, torch.device(config.runtime.device)):
            made = _sample_batch(
                assembly,
                denoiser,
                indices[batch],
                labels[batch],
                observe=observe,
                given={level: videos[batch] for level, videos in given.items()},
                report=report,
            )
        for level, videos in enumerate(made):
            finished[level].append(videos)
    return [torch.cat(parts) if parts else _empty(assembly, level) for level, parts in enumerate(finished)]


def _empty(assembly: Assembly, level: int) -> Tensor:
    return torch.empty(0, assembly.config.model.channels, *assembly.pyramid.size(level))


def _sample_batch(
    assembly: Assembly,
    denoiser: CascadeDenoiser,
    indices: Sequence[int],
    labels: Sequence[int],
    *,
    observe: Observe | None,
    given: Mapping[int, Tensor],
    report: Progress,
) -> list[Tensor]:
    config = assembly.config
    pyramid = assembly.pyramid
    solver = assembly.solver
    device = torch.device(config.runtime.device)
    dtype = state_dtype(config.sampling)
    # Random numbers are float32, unless sampling is in float64.
    wider = dtype if dtype == torch.float64 else None
    size = config.runtime.tile_batch
    layout = Layout(pyramid, config.data.downsampling, torch.tensor(list(labels), device=device))
    levels = config.model.levels
    sigma_eff = config.sampling.context_sigma_eff

    def told(videos: Tensor) -> Tensor:
        return videos if wider is None else videos.float()

    finished: list[Tensor] = []
    parents: list[Tensor] = []  # noised states of the finished levels
    for level in range(levels):
        if level in given:
            videos = given[level].to(device, dtype)
        else:
            offsets = parent_by_parent(level, pyramid.tiles(level, config.sampling.overlap), layout)
            batches = tile_batches(level, offsets, layout, size=size)
            sigmas = [sigma_eff / denoiser.sigma_in[k] for k in range(level)]
            ancestors = Ancestors(denoiser, layout, parents, sigmas, size=size)
            contexts = _contexts(ancestors, batches, config.runtime, device)
            shape = (config.model.channels, *pyramid.size(level))

            def noise(i: int, level: int = level, shape: tuple[int, ...] = shape) -> Tensor:
                fields = [normal(shape, config.seed, "sampling", index, level, i) for index in indices]
                return torch.stack(fields).to(device, wider, non_blocking=True)

            denoise = tiled_denoise(denoiser, batches, contexts)
            numbers = {"level": level, "levels": levels, "calls": solver.calls(level)}
            videos = solver.solve(level, _counted(denoise, numbers, report), noise)
            if not bool(torch.isfinite(videos).all()):
                raise TroubleError(
                    f"sampling: level {level} (of 0 to {levels - 1}) came out with values that are not "
                    f"finite, in samples {min(indices)} to {max(indices)}; check the model and the "
                    "solver's options"
                )
            videos = videos.clamp(-1, 1)
            if observe is not None:
                # A copy, because observers may write into it.
                observe(level, told(videos).detach().to("cpu", copy=True))
        finished.append(told(videos).cpu())
        if level + 1 < levels:
            parents.append(
                noised_parents(videos, indices, seed=config.seed, level=level, sigma_eff=sigma_eff)
                / denoiser.sigma_in[level]
            )
    return finished


def _contexts(
    ancestors: Ancestors, batches: Sequence[TileBatch], runtime: RuntimeConfig, device: torch.device
) -> LevelContexts:
    """Return the contexts of ``batches``, all of one level, cached or not (``runtime.cache``)."""
    if batches[0].level == 0:
        return NoContexts()
    if runtime.cache == "none":
        return FreshContexts(ancestors, batches)
    budget = None if runtime.cache_memory is None else int(runtime.cache_memory * GIB)
    return CachedContexts(ancestors, batches, device=device, budget=budget)


def _counted(denoise: Denoise, numbers: dict[str, int], report: Progress) -> Denoise:
    calls = itertools.count(1)

    def counted(z: Tensor, sigma: float) -> Tensor:
        denoised = denoise(z, sigma)
        report({**numbers, "call": next(calls)})
        return denoised

    return counted


def noised_parents(
    videos: Tensor, indices: Sequence[int], *, seed: int, level: int, sigma_eff: float
) -> Tensor:
    """Return finished ``videos`` [n, C, F, H, W] of ``level`` with noise of standard deviation ``sigma_eff``.

    There is one noise field per video and level, so that all tiles of all finer levels see the same parent.
    """
    fields = [normal(tuple(videos.shape[1:]), seed, "context_noise", index, level) for index in indices]
    return videos + sigma_eff * torch.stack(fields).to(videos)


def tiled_denoise(
    denoiser: CascadeDenoiser, batches: Sequence[TileBatch], contexts: LevelContexts
) -> Denoise:
    """Return a function that denoises a level's state z [n, C, F, H, W] at sigma in tiles, averaged where they overlap.

    The function passes each tile's latents from one call to the next (latent self-conditioning); the first call
    has none.
    """
    latents: list[Tensor | None] = [None] * len(batches)
    counts: Tensor | None = None

    def denoise(z: Tensor, sigma: float) -> Tensor:
        nonlocal counts
        total = torch.zeros_like(z)
        contexts.begin()
        for i, batch in enumerate(batches):
            noise_level = torch.full((len(batch),), sigma, device=z.device, dtype=z.dtype)
            denoised, latents[i] = denoiser(
                batch.level,
                batch.crop(z),
                noise_level,
                batch.coords,
                batch.label,
                contexts.get(i),
                latents[i],
            )
            batch.add(total, denoised)
        if counts is None:
            counts = torch.zeros_like(z)
            for batch in batches:
                batch.add(counts, counts.new_ones(()).expand(len(batch), z.shape[1], *batch.size))
        return total / counts

    return denoise
