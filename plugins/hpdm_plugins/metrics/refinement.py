"""Metrics that show which level of the cascade causes errors: `refinement` and `seams`.

`refinement` evaluates a finer level with real parents, so that errors of coarser levels have no influence. It measures
the denoiser's error at high noise, where all information comes from the parents, and the error of samples, once
with all coarser levels real and once with only level 0 real. Each is compared with trilinear upsampling of the real
level. Not here: `memorisation`, which matches generated videos to training windows.

`seams` measures whether the boundaries of the tiles that a level is sampled in are visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import Pyramid, downsample
from hpdm_core.sampling.cascade import sample

if TYPE_CHECKING:
    from hpdm_core.data.dataset import Split
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row
    from hpdm_core.solver import Denoise, Noise

__all__ = ["Refinement", "Seams"]

FIRST = 2_000_000
"""First sample index of this metric. Its noise differs from that of the cell's samples."""
BATCH = 16
"""Number of videos whose differences are computed together."""
AXES: dict[str, int] = {"f": 1, "h": 2, "w": 3}
"""Axes of stored videos [n, F, H, W, C]."""


class Refinement:
    """Finer levels from real parents, on ``clips`` clips of ``split``; the denoiser's error at ``sigma_eff``."""

    name = "refinement"
    needs: Need = "samples"  # it does not read samples, but depends on how they are sampled

    def __init__(self, *, clips: int, split: Split, sigma_eff: float) -> None:
        self.clips = clips
        self.split: Split = split
        self.sigma_eff = sigma_eff

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """See `hpdm_core.metrics.interface.Metric`."""
        return {
            "metric": self.name,
            "clips": self.clips,
            "split": self.split,
            "sigma_eff": self.sigma_eff,
            "error": "mean squared error of the denoised estimate of a whole level, tile by tile, the second of two "
            "passes, data units, cut to [-1, 1]",
            "psnr": "dB, peak 2, of samples, mean over clips; a sample from the true posterior has twice the squared "
            "error of the posterior's mean, which is 3 dB",
            "upsampled": "trilinear, align_corners=False, of the finest real level that the network saw",
            "labels": "the clips' own",
            "downsampling": assembly.config.data.downsampling,
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return rows per level above 0; ``parents`` is "true" if all coarser levels were real, else "level 0"."""
        assembly = context.assembly
        pyramid, mode = assembly.pyramid, assembly.config.data.downsampling
        clips = [context.clip(self.name, self.split, number) for number in range(self.clips)]
        whole = torch.stack([clip.video for clip in clips])  # [n, C, F, H, W]
        real = [downsample(whole, pyramid.pitch(level), mode) for level in range(pyramid.levels)]
        labels = [clip.label if assembly.config.model.classes else -1 for clip in clips]
        indices = range(FIRST, FIRST + self.clips)

        def made(of: Assembly, given: Sequence[int]) -> list[Tensor]:
            known = {level: real[level] for level in given}
            return sample(of, context.denoiser, indices, labels, given=known)

        asked_once = Assembly(assembly.config, assembly.plugins)
        asked_once.solver = _OneEstimate(real, assembly.sigma_in, self.sigma_eff)
        rows: list[Row] = []
        from_coarsest = made(assembly, [0])
        for level in range(1, pyramid.levels):
            others = [other for other in range(pyramid.levels) if other != level]  # only `level` is made
            estimate, sampled = made(asked_once, others)[level], made(assembly, others)[level]
            below, coarsest = _upsampled(real[level - 1], real[level]), _upsampled(real[0], real[level])
            found = {
                ("error", "true"): _errors(estimate, real[level]).mean(),
                ("error_upsampled", "true"): _errors(below, real[level]).mean(),
                ("psnr", "true"): _psnr(sampled, real[level]),
                ("psnr_upsampled", "true"): _psnr(below, real[level]),
                ("psnr", "level 0"): _psnr(from_coarsest[level], real[level]),
                ("psnr_upsampled", "level 0"): _psnr(coarsest, real[level]),
            }
            rows += [
                {"metric": f"{self.name}.{what}", "level": level, "value": float(value), "parents": parents}
                for (what, parents), value in found.items()
            ]
        return rows


class _OneEstimate:
    """A replacement for the solver: the denoised estimate, in two passes, of a real level with noise ``sigma_eff``."""

    def __init__(self, real: Sequence[Tensor], sigma_in: Sequence[float], sigma_eff: float) -> None:
        self._real = real
        self._sigma_in = sigma_in
        self._sigma_eff = sigma_eff
        self._done = [0] * len(real)  # number of finished videos; they come in batches and in order

    def calls(self, level: int) -> int:
        """Return the number of denoiser calls."""
        return 2

    def solve(self, level: int, denoise: Denoise, noise: Noise) -> Tensor:
        """Return the estimate of the next videos of ``level``."""
        drawn = noise(0)
        first, scale = self._done[level], self._sigma_in[level]
        self._done[level] += len(drawn)
        clean = self._real[level][first : first + len(drawn)].to(drawn)
        sigma = self._sigma_eff / scale
        z = clean / scale + sigma * drawn
        denoise(z, sigma)
        return denoise(z, sigma)  # self-conditioned on the first pass


def _upsampled(coarse: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(coarse, size=like.shape[2:], mode="trilinear", align_corners=False)


def _errors(videos: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of each of ``videos`` [n, C, F, H, W] against its target: [n], float64."""
    return reduce((videos.double() - targets.double()).square(), "n c f h w -> n", "mean")


def _psnr(videos: Tensor, targets: Tensor) -> Tensor:
    """Return the mean PSNR in dB, peak 2; limited to 106, so that it is finite for equal videos."""
    return (10 * torch.log10(4 / _errors(videos, targets).clamp(min=1e-10))).mean()


class Seams:
    """Ratio of the mean difference of neighbouring pixels across tile boundaries to that of all other neighbours."""

    name = "seams"
    needs: Need = "samples"

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """See `hpdm_core.metrics.interface.Metric`."""
        return {
            "metric": self.name,
            "measure": "mean absolute difference of neighbours across the faces of tiles, divided by that of all "
            "other neighbours on the axis; real: the same of held-out clips, where no tile is",
            "samples": assembly.config.evaluation.samples,
            "reals": assembly.config.evaluation.reals,
            "overlap": list(assembly.config.sampling.overlap),
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return rows per level and per ``axis`` with tile boundaries, for samples and for real clips."""
        assembly = context.assembly
        split: Split = "held_out" if context.has_held_out else "train"
        levels = range(assembly.pyramid.levels)

        def sampled(numbers: range) -> list[Tensor]:
            return [context.samples(level, numbers) for level in levels]

        sources = {
            "seams": (assembly.config.evaluation.samples, sampled),
            "seams.real": (
                assembly.config.evaluation.reals,
                lambda numbers: context.reals(split, numbers)[0],
            ),
        }
        rows: list[Row] = []
        for metric, (count, videos) in sources.items():
            sums = [
                _Differences(faces_between_tiles(assembly, level), level, assembly.pyramid)
                for level in levels
            ]
            for start in range(0, count, BATCH):
                for level, batch in enumerate(videos(range(start, min(start + BATCH, count)))):
                    sums[level].add(batch)
            rows += [
                {"metric": metric, "level": level, "value": value, "axis": axis}
                for level in levels
                for axis, value in sums[level].ratios().items()
            ]
        return rows


def faces_between_tiles(assembly: Assembly, level: int) -> dict[str, list[int]]:
    """Return, per axis, the pixel indices i of ``level`` such that a tile ends or begins between i - 1 and i."""
    pyramid = assembly.pyramid
    tiles = pyramid.tiles(level, assembly.config.sampling.overlap)
    found = {}
    for number, axis in enumerate(AXES):
        edges = {tile[number] + side for tile in tiles for side in (0, pyramid.patch[number])}
        found[axis] = sorted(edges - {0, pyramid.size(level)[number]})
    return found


class _Differences:
    """Sums of absolute differences of neighbouring pixels, across tile boundaries and elsewhere."""

    def __init__(self, faces: dict[str, list[int]], level: int, pyramid: Pyramid) -> None:
        sizes = dict(zip(AXES, pyramid.size(level), strict=True))
        self._across = {axis: [i - 1 for i in places] for axis, places in faces.items() if places}
        self._elsewhere = {
            axis: [i for i in range(sizes[axis] - 1) if i not in across]
            for axis, across in self._across.items()
        }
        self._sums = {axis: torch.zeros(2, dtype=torch.float64) for axis in self._across}

    def add(self, videos: Tensor) -> None:
        """Add uint8 ``videos`` [n, F, H, W, C]."""
        for axis, across in self._across.items():
            steps = videos.double().diff(dim=AXES[axis]).abs()
            lines = rearrange(steps.movedim(AXES[axis], 0), "i n a b c -> i (n a b c)").mean(dim=1) * len(
                videos
            )
            self._sums[axis] += torch.stack([lines[across].mean(), lines[self._elsewhere[axis]].mean()])

    def ratios(self) -> dict[str, float]:
        """Return, per axis with tile boundaries, the ratio across / elsewhere; infinite if all others are equal."""
        return {
            axis: float(across / elsewhere) if elsewhere else (float("inf") if across else 1.0)
            for axis, (across, elsewhere) in ((axis, sums.tolist()) for axis, sums in self._sums.items())
            if self._elsewhere[axis]
        }


def refinement(
    *,
    clips: Annotated[int, Field(gt=0)] = 16,
    split: Literal["held_out", "train"] = "held_out",
    sigma_eff: Annotated[float, Field(gt=0)] = 20.0,
) -> Refinement:
    """Return the metric: errors of the denoiser and of samples with real parents, compared with upsampling."""
    return Refinement(clips=clips, split=split, sigma_eff=sigma_eff)


@hookimpl
def register_metrics(register: Register) -> None:
    """Add refinement and seams."""
    register("refinement", refinement, source="ours: finer levels from real parents, beside plain upsampling")
    register("seams", Seams, source="ours: differences across the faces of tiles against elsewhere")
