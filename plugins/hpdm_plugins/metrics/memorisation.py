"""The metric `memorisation`: does a model reproduce the clips that it was trained on?

For studies that overfit on purpose (a dataset with a fixed set of windows, `ClipDataset.distinct`): each generated
video is matched to the window with the smallest error. For comparison, the next coarser level is upsampled
trilinearly, once that of the generated video and once that of the window. Then videos are sampled from the given
coarsest level of each window, and the metric checks whether the finer levels match this window.

For all other studies, with ``clips: true``: generated videos are matched to ``evaluation.reals`` training clips, and so
are as many held-out clips as there are samples. Samples of a model that copies are nearer to the training clips than
held-out clips are.

PSNR is in decibels with peak 2, the width of [-1, 1], of the mean squared error over a whole video.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Later
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import downsample
from hpdm_core.sampling.cascade import sample

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row

__all__ = ["Memorisation", "psnr"]

NEARER = 0.95
"""A sample counts as a copy if it is nearer to a training clip than this share of the held-out clips is."""
FOLLOWING = 1_000_000
"""First sample index of videos whose level 0 is given. Their noise differs from that of the cell's samples."""


def psnr(videos: Tensor, targets: Tensor) -> Tensor:
    """Return the PSNR [n, m] of each of ``videos`` [n, C, F, H, W] against each of ``targets`` [m, C, F, H, W].

    In dB, limited to 106, so that it is finite for equal videos.
    """
    left, right = (rearrange(each.double(), "n c f h w -> n (c f h w)") for each in (videos, targets))
    # By matrix products, because the tensor of all differences would be too large; in float64 exact to 1e-14.
    squares = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
    return 10 * torch.log10(4 / (squares / left.shape[1]).clamp(min=1e-10))


class Memorisation:
    """The metric; ``follow``: number of windows whose level 0 is given; ``clips``: compare with training clips."""

    name = "memorisation"
    needs: Need = "samples"

    def __init__(self, *, follow: int = 8, clips: bool = False) -> None:
        self.follow = follow
        self.clips = clips

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """See `hpdm_core.metrics.interface.Metric`."""
        evaluation = assembly.config.evaluation
        if self.clips:
            return {
                "metric": self.name,
                "measure": "PSNR in dB, peak 2, of a whole video against its best match among training clips",
                "samples": evaluation.samples,
                "held_out_clips": evaluation.samples,
                "training_clips": evaluation.reals,
                "copied": f"share of samples with a better match than {NEARER:.0%} of the held-out clips",
                "downsampling": assembly.config.data.downsampling,
            }
        return {
            "metric": self.name,
            "measure": "PSNR in dB, peak 2, of a whole video against its best match among the training windows",
            "upsampling": "trilinear, align_corners=False, of the level below",
            "samples": evaluation.samples,
            "follow": self.follow,
            "downsampling": assembly.config.data.downsampling,
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return rows per level; see the module's docstring."""
        assembly = context.assembly
        if self.clips:
            return self._against_clips(context)
        distinct = getattr(assembly.dataset, "distinct", lambda split: None)("train")
        if not distinct:
            raise InputError(
                f"metric memorisation: data.dataset '{assembly.config.data.dataset.use}' has no fixed set of windows; "
                "allowed is one that has, such as {use: sample_clips, windows: 8}, or the metric's option clips: true"
            )
        clips = torch.stack([clip.video for clip in distinct])  # [m, C, F, H, W]
        pyramid, mode = assembly.pyramid, assembly.config.data.downsampling
        windows = [downsample(clips, pyramid.pitch(level), mode) for level in range(pyramid.levels)]
        indices = range(assembly.config.evaluation.samples)
        samples = [_pixels(context.samples(level, indices)) for level in range(pyramid.levels)]
        rows = [row for level in range(pyramid.levels) for row in self._level(level, samples, windows)]
        return rows + self._following(context, windows, [clip.label for clip in distinct])

    def _against_clips(self, context: EvaluationContext) -> list[Row]:
        evaluation, levels = context.assembly.config.evaluation, context.assembly.pyramid.levels
        if not context.has_held_out:
            raise InputError(
                f"metric memorisation with clips: true: data.dataset '{context.assembly.config.data.dataset.use}' has "
                "no held-out clips here; allowed is a dataset with held-out clips, to which samples are compared"
            )
        trained, _ = context.reals("train", range(evaluation.reals))
        held_out, _ = context.reals("held_out", range(evaluation.samples))
        rows = []
        for level in range(levels):
            clips = _pixels(trained[level])
            best, real = (
                psnr(_pixels(videos), clips).max(dim=1).values
                for videos in (context.samples(level, range(evaluation.samples)), held_out[level])
            )
            rows += [
                self._row("psnr", level, best.mean()),
                self._row("psnr_held_out", level, real.mean()),
                self._row("copied", level, (best > real.quantile(NEARER)).double().mean()),
            ]
        return rows

    def _level(self, level: int, samples: list[Tensor], windows: list[Tensor]) -> list[Row]:
        against = psnr(samples[level], windows[level])
        best, matched = against.max(dim=1)
        rows = [
            self._row("psnr", level, best.mean()),
            self._row("psnr_worst", level, best.min()),
            self._row("windows_found", level, matched.unique().numel()),
        ]
        if level:
            target = windows[level][matched]
            size = tuple(target.shape[2:])
            for name, below in (
                ("upsampled_sample", samples[level - 1]),
                ("upsampled_window", windows[level - 1][matched]),
            ):
                rough = F.interpolate(below, size=size, mode="trilinear", align_corners=False)
                rows.append(self._row(f"{name}_psnr", level, psnr(rough, target).diagonal().mean()))
        return rows

    def _following(self, context: EvaluationContext, windows: list[Tensor], labels: list[int]) -> list[Row]:
        """Sample from the given level 0 of the windows; check whether finer levels best match the same window."""
        assembly = context.assembly
        number = min(self.follow, len(labels))
        known = [label if assembly.config.model.classes else -1 for label in labels[:number]]
        made = sample(
            assembly,
            context.denoiser,
            range(FOLLOWING, FOLLOWING + number),
            known,
            given={0: windows[0][:number]},
        )
        rows = []
        for level in range(1, len(windows)):
            against = psnr(made[level].clamp(-1, 1), windows[level])
            own = against.argmax(dim=1) == torch.arange(number)
            rows.append(self._row("follows", level, own.double().mean()))
            rows.append(self._row("follows_psnr", level, against.diagonal().mean()))
        return rows

    def _row(self, what: str, level: int, value: Tensor | int) -> Row:
        return {"metric": f"{self.name}.{what}", "level": level, "value": float(value)}


def _pixels(videos: Tensor) -> Tensor:
    """Return stored videos, uint8 [n, F, H, W, C], as [n, C, F, H, W] in [-1, 1]."""
    return rearrange(videos, "n f h w c -> n c f h w").float() / 127.5 - 1


def memorisation(
    *, follow: Annotated[int, Field(gt=0)] = 8, clips: Annotated[bool, Later()] = False
) -> Memorisation:
    """Return the metric: best match among the training windows, and whether finer levels follow a given coarsest level.

    With ``clips``: best match among training clips, compared with that of held-out clips.
    """
    return Memorisation(follow=follow, clips=clips)


@hookimpl
def register_metrics(register: Register) -> None:
    """Add memorisation."""
    register("memorisation", memorisation, source="ours: a check that the whole chain generates")
