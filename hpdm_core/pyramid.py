"""Levels, scales, offsets, tiles and parents of the patch pyramid, and how a level's pixels are made.

Paper: Hierarchical Patch Diffusion Models, section 4 (nested patches, Eq 6-9) and 4.4 (tiled inference).
Level 0 is the coarsest and shows the whole video in one patch; level L-1 has the full resolution of the video;
every patch has the same number of pixels. An offset is an integer number of the level's own pixels, so that
cropping and downsampling commute. Axes are always (frames, height, width).

Pure functions and frozen dataclasses; this module does not depend on networks or noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from hpdm_core.base.errors import InputError

__all__ = [
    "AXES",
    "DOWNSAMPLINGS",
    "CoordinateSampler",
    "Coords",
    "Pyramid",
    "Triple",
    "crop",
    "downsample",
    "level_patch",
    "level_patches",
    "unit_range",
]

Triple = tuple[int, int, int]
"""Frames, height, width."""

AXES = ("f", "h", "w")


class CoordinateSampler(Protocol):
    """Draws the positions of the patches of one training video."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return nested offsets, int64 [L, 3], in each level's own pixels, drawn from ``generator`` alone."""
        ...


@dataclass(frozen=True)
class Coords:
    """Positions of a batch of patches of one level in their videos; the whole video has length 1 on every axis.

    ``offset`` [B, 3] is the lower corner, ``scale`` [3] the extent of a patch. ``extent`` is ``scale`` as Python
    numbers where they are known, so that tensor shapes can be computed without a device synchronisation.
    """

    offset: Tensor
    scale: Tensor
    extent: tuple[float, float, float] | None = None

    def centres(self, grid: Triple) -> Tensor:
        """Return the centres of the patch's cells [B, 3, n], n = f*h*w row-major; whole video = [-1, 1]."""
        f, h, w = (2 * axis - 1 for axis in self._axes(grid))  # each [B, cells of the axis]
        batch = self.offset.shape[0]
        full = (batch, *grid)
        volumes = (
            rearrange(f, "b f -> b f 1 1").expand(full),
            rearrange(h, "b h -> b 1 h 1").expand(full),
            rearrange(w, "b w -> b 1 1 w").expand(full),
        )
        return rearrange(torch.stack(volumes, dim=1), "b a f h w -> b a (f h w)")

    def within(self, other: Coords, grid: Triple) -> tuple[Tensor, Tensor, Tensor]:
        """Return this patch's cell centres in the unit frame of ``other``: per axis [B, cells of the axis].

        Eq 8: u = (offset - offset') / scale' + (scale / scale') * (i + 1/2) / n. Positions are separable,
        because patches are axis-aligned. Rows of the two match.
        """
        f, h, w = (
            (axis - other.offset[:, index, None]) / other.scale[index]
            for index, axis in enumerate(self._axes(grid))
        )
        return f, h, w

    def share_of(self, other: Coords) -> tuple[float, float, float] | None:
        """Return the share of ``other`` that this patch covers per axis, scale / scale'; None if not known."""
        if self.extent is None or other.extent is None:
            return None
        f, h, w = (mine / theirs for mine, theirs in zip(self.extent, other.extent, strict=True))
        return f, h, w

    def take(self, rows: Tensor) -> Coords:
        """Return the given rows (int64), in that order; rows may repeat."""
        return replace(self, offset=self.offset[rows])

    def to(self, device: torch.device | str) -> Coords:
        """Return a copy on ``device``; a copy to an accelerator is asynchronous."""
        ahead = torch.device(device).type != "cpu"
        return replace(
            self,
            offset=self.offset.to(device, non_blocking=ahead),
            scale=self.scale.to(device, non_blocking=ahead),
        )

    def _axes(self, grid: Triple) -> list[Tensor]:
        """Cell centres per axis as fractions of the whole video, each [B, cells of the axis]."""
        made = []
        for index, cells in enumerate(grid):
            steps = (torch.arange(cells, device=self.offset.device, dtype=self.offset.dtype) + 0.5) / cells
            made.append(self.offset[:, index, None] + self.scale[index] * steps)
        return made


@dataclass(frozen=True)
class Pyramid:
    """The sizes of a pyramid, in pixels: whole ``video``, ``patch`` (the same on every level) and ``token``.

    Raises `InputError` unless the patch divides the video, the token divides the patch, and video / patch is
    the (``levels - 1``)-th power of an integer on every axis (with one level: video = patch).
    """

    video: Triple
    patch: Triple
    token: Triple
    levels: int
    channels: int = 3

    def __post_init__(self) -> None:
        problems = []
        if self.levels < 1:
            problems.append(f"model.levels: {self.levels}; allowed is 1 or more")
        for axis, video, patch, token in zip(AXES, self.video, self.patch, self.token, strict=True):
            if min(video, patch, token) < 1:
                problems.append(
                    f"model: {axis}: video {video}, patch {patch}, token {token}; all must be 1 or more"
                )
                continue
            if patch % token:
                problems.append(f"model.patch: {axis} = {patch} is not a multiple of token {token}")
            if video % patch:
                problems.append(f"model.video: {axis} = {video} is not a multiple of patch {patch}")
            elif self.levels >= 1 and _root(video // patch, self.levels - 1) is None:
                times = "1" if self.levels == 1 else f"a whole number to the power {self.levels - 1}"
                problems.append(
                    f"model.video: {axis} = {video} is {video // patch} times patch {patch}; with "
                    f"{self.levels} level(s) it must be {times}"
                )
        if problems:
            raise InputError(*problems)

    @cached_property
    def ratio(self) -> Triple:
        """Factor by which each level is finer than the one before, per axis: (video / patch) ** (1 / (levels - 1))."""
        f, h, w = (
            _root(video // patch, self.levels - 1) or 1
            for video, patch in zip(self.video, self.patch, strict=True)
        )
        return f, h, w

    @property
    def grid(self) -> Triple:
        """Tokens of a patch per axis."""
        f, h, w = (patch // token for patch, token in zip(self.patch, self.token, strict=True))
        return f, h, w

    def size(self, level: int) -> Triple:
        """Pixels of the level's whole video."""
        self._check(level)
        f, h, w = (patch * q**level for patch, q in zip(self.patch, self.ratio, strict=True))
        return f, h, w

    def pitch(self, level: int) -> Triple:
        """Full-resolution pixels per pixel of this level."""
        f, h, w = (video // size for video, size in zip(self.video, self.size(level), strict=True))
        return f, h, w

    def scale(self, level: int) -> tuple[float, float, float]:
        """Extent of a patch of this level, whole video = 1: s_l in the paper."""
        f, h, w = (patch / size for patch, size in zip(self.patch, self.size(level), strict=True))
        return f, h, w

    def tiles(self, level: int, overlap: Collection[str]) -> list[Triple]:
        """Return the offsets of the tiles that cover a level, in its own pixels, row-major (f, h, w).

        On the axes named in ``overlap``, neighbours overlap by half a patch; on the others they touch. Raises
        `InputError` for an unknown axis, or if half a patch is not an integer number of pixels.
        """
        unknown = sorted(set(overlap) - set(AXES))
        if unknown:
            raise InputError(f"sampling.overlap: {', '.join(unknown)}; allowed are {', '.join(AXES)}")
        starts = []
        for axis, size, patch in zip(AXES, self.size(level), self.patch, strict=True):
            stride = patch
            if axis in overlap and size > patch:
                if patch % 2:
                    raise InputError(
                        f"sampling.overlap: {axis}: half of patch {patch} is not a whole number of pixels"
                    )
                stride = patch // 2
            starts.append(range(0, size - patch + 1, stride))
        frames, heights, widths = starts
        return list(itertools.product(frames, heights, widths))

    def containing(self, level: int, offset: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return, per axis, the first and last offset of the patches of ``level - 1`` that contain the given patch.

        The given patch is at ``offset`` in the pixels of ``level`` (1 or more); the result is in the pixels of
        ``level - 1``. At least one such patch exists.
        """
        if level < 1:
            raise ValueError(f"level {level} has no parent")
        self._check(level)
        bounds = []
        limits = self.size(level - 1)
        for start, patch, q, limit in zip(offset, self.patch, self.ratio, limits, strict=True):
            first = max(-(-(start + patch) // q) - patch, 0)
            bounds.append((first, min(start // q, limit - patch)))
        return tuple(bounds)

    def parent(self, level: int, offset: Triple) -> Triple:
        """Return the offset of the immediate parent, a patch of ``level - 1``, of the patch of ``level`` at ``offset``.

        The parent is centred on the child, rounded down to the parent's pixels and kept within the video; it
        always contains the child. It does not depend on the overlap of the tiles.
        """
        f, h, w = (
            # floor of (start + patch / 2) / q - patch / 2
            min(max((2 * start + patch - q * patch) // (2 * q), first), last)
            for start, patch, q, (first, last) in zip(
                offset, self.patch, self.ratio, self.containing(level, offset), strict=True
            )
        )
        return f, h, w

    def chain(self, level: int, offset: Triple) -> tuple[Triple, ...]:
        """Return the offsets of all ancestors, level 0 first, each the parent of the next."""
        offsets: list[Triple] = []
        for child in range(level, 0, -1):
            offset = self.parent(child, offset)
            offsets.append(offset)
        return tuple(reversed(offsets))

    def coords(self, level: int, offsets: Tensor, *, downsampling: str = "area") -> Coords:
        """Return the coordinates of patches at integer ``offsets`` [B, 3] in the level's own pixels.

        ``centre_frame`` downsampling takes the frame at index pitch // 2 of each group. For an even pitch, the
        centre of that frame lies half a full-resolution frame after the centre of the group; the coordinates
        are shifted accordingly.
        """
        device = offsets.device
        pixels = offsets.float()  # exact, also with the half-frame below: only the division rounds
        if downsampling == "centre_frame" and self.pitch(level)[0] % 2 == 0:
            pixels = pixels + torch.tensor([0.5 / self.pitch(level)[0], 0.0, 0.0], device=device)
        return Coords(
            offset=pixels / torch.tensor(self.size(level), dtype=torch.float32, device=device),
            scale=torch.tensor(self.scale(level), dtype=torch.float32, device=device),
            extent=self.scale(level),
        )

    def _check(self, level: int) -> None:
        if not 0 <= level < self.levels:
            raise ValueError(f"level {level}; allowed is 0 to {self.levels - 1}")


def _root(number: int, power: int) -> int | None:
    """Return the integer q with q ** power == number, or None."""
    if power == 0:
        return 1 if number == 1 else None
    nearest = round(number ** (1 / power))
    return nearest if nearest**power == number else None


def _mean_of(video: Tensor, axis: int, pitch: int, picked: Sequence[int]) -> Tensor:
    """Average the ``picked`` members of each group of ``pitch`` along ``axis`` (-3, -2 or -1).

    They are added one by one, so that every output pixel is summed in the same order for any memory layout. So
    the downsampled crop equals the crop of the downsampled video bit by bit.
    """
    index: list[slice] = [slice(None)] * video.ndim
    total: Tensor | None = None
    for member in picked:
        index[axis] = slice(member, None, pitch)
        part = unit_range(video[tuple(index)])
        total = part if total is None else total + part
    if total is None:
        raise ValueError("no member picked")
    return total / len(picked) if len(picked) > 1 else total


def _area(video: Tensor, pitch: Triple) -> Tensor:
    """The average of each block of pixels."""
    for axis, step in zip((-3, -2, -1), pitch, strict=True):
        video = _mean_of(video, axis, step, range(step))
    return video


def _trilinear(video: Tensor, pitch: Triple) -> Tensor:
    """The value at each block's centre: the mean of the two middle pixels, or the middle one.

    Equal to trilinear resizing without antialiasing (align_corners=False).
    """
    for axis, step in zip((-3, -2, -1), pitch, strict=True):
        video = _mean_of(video, axis, step, range((step - 1) // 2, step // 2 + 1))
    return video


def _centre_frame(video: Tensor, pitch: Triple) -> Tensor:
    """The frame at index pitch // 2 of each group, its pixels averaged over blocks."""
    frames, height, width = pitch
    return _area(_mean_of(video, -3, frames, [frames // 2]), (1, height, width))


DOWNSAMPLINGS: dict[str, Callable[[Tensor, Triple], Tensor]] = {
    "area": _area,
    "trilinear": _trilinear,
    "centre_frame": _centre_frame,
}


def downsample(video: Tensor, pitch: Triple, mode: str) -> Tensor:
    """Return ``video`` [..., F, H, W] downsampled by the factors ``pitch``, by one of `DOWNSAMPLINGS`.

    uint8 pixels are converted to float32 in [-1, 1], see `unit_range`.

    Raises ValueError when the pitch does not divide the size, or for an unknown mode.
    """
    if mode not in DOWNSAMPLINGS:
        raise ValueError(f"downsampling '{mode}'; allowed are {', '.join(DOWNSAMPLINGS)}")
    if any(size % step for size, step in zip(video.shape[-3:], pitch, strict=True)):
        raise ValueError(f"size {tuple(video.shape[-3:])} is not a multiple of pitch {pitch}")
    return DOWNSAMPLINGS[mode](video, pitch)


def crop(video: Tensor, offsets: Tensor, size: Triple) -> Tensor:
    """Return one crop of ``size`` per row of ``video`` [B, C, F, H, W], at ``offsets`` [B, 3] pixels.

    Raises ValueError when a crop leaves the video.
    """
    corners: list[list[int]] = offsets.tolist()
    if len(corners) != video.shape[0]:
        raise ValueError(f"{len(corners)} offsets for {video.shape[0]} videos")
    return torch.stack([_cut(row, corner, size) for row, corner in zip(video, corners, strict=True)])


def unit_range(pixels: Tensor) -> Tensor:
    """Return uint8 ``pixels``, 0 to 255, as a new float32 tensor in [-1, 1]; other types are returned unchanged."""
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels


def level_patch(video: Tensor, pyramid: Pyramid, level: int, offset: Sequence[int], mode: str) -> Tensor:
    """Return the patch [C, f, h, w] at ``offset`` (in the level's pixels) of a full-resolution video [C, F, H, W].

    The video is cropped first, then downsampled; on the last level the pixels are exactly those of the video. A
    video is float32 in [-1, 1], or uint8 as decoded. For uint8 the result equals that of `unit_range` of the
    whole video bit by bit, but only the crop is converted to float32, in pieces that fit the processor's cache.
    """
    pitch = pyramid.pitch(level)
    region = _region(video, pyramid, level, offset)
    if region.dtype != torch.uint8:
        return downsample(region, pitch, mode)
    groups = rearrange(region, "c (f step) h w -> f c step h w", step=pitch[0]).unbind()
    return torch.cat([downsample(group, pitch, mode) for group in groups], dim=-3)


def level_patches(
    videos: Sequence[Tensor], pyramid: Pyramid, level: int, offsets: Sequence[Sequence[int]], mode: str
) -> Tensor:
    """Return the `level_patch` of each of ``videos`` (float32) at its own offset, [B, C, f, h, w].

    The result is bitwise equal. The videos are downsampled together, which is much faster for small ones.
    """
    regions = [_region(video, pyramid, level, at) for video, at in zip(videos, offsets, strict=True)]
    return downsample(torch.stack(regions), pyramid.pitch(level), mode).contiguous()


def _region(video: Tensor, pyramid: Pyramid, level: int, offset: Sequence[int]) -> Tensor:
    """Return the region of the full-resolution video [C, F, H, W] that a patch shows."""
    pitch = pyramid.pitch(level)
    corner = [start * step for start, step in zip(offset, pitch, strict=True)]
    f, h, w = (patch * step for patch, step in zip(pyramid.patch, pitch, strict=True))
    return _cut(video, corner, (f, h, w))


def _cut(video: Tensor, corner: Sequence[int], size: Triple) -> Tensor:
    """Cut a box out of one video [C, F, H, W]; ValueError when it leaves the video."""
    for start, extent, limit in zip(corner, size, video.shape[-3:], strict=True):
        if start < 0 or start + extent > limit:
            raise ValueError(
                f"crop of {size} at {tuple(corner)} leaves the video of {tuple(video.shape[-3:])}"
            )
    f, h, w = (slice(start, start + extent) for start, extent in zip(corner, size, strict=True))
    return video[:, f, h, w]
