"""Rules by which published protocols resize frames to a detector's input size.

All take and return float32 [B, C, F, H, W] in any value range, and leave the time axis unchanged. None of them applies
antialiasing when it shrinks frames: the published tools do not either, which affects their numbers.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from hpdm_core.base.errors import InputError

__all__ = [
    "RESIZE_RULES",
    "ResizeRule",
    "aligned_corners",
    "check_uint8",
    "cubic_then_crop",
    "legacy_bilinear",
    "pixels",
    "short_side_then_crop",
    "squash",
    "unchanged",
]

ResizeRule = Literal[
    "squash", "legacy_bilinear", "short_side_then_crop", "aligned_corners", "cubic_then_crop", "none"
]


def check_uint8(videos: Tensor) -> None:
    """Raise InputError unless ``videos`` are uint8: another value range could not be detected otherwise."""
    if videos.dtype != torch.uint8:
        raise InputError(f"detector: videos of type {videos.dtype}; allowed is uint8, 0..255")


def pixels(videos: Tensor) -> Tensor:
    """Return uint8 ``videos`` [n, F, H, W, 3] as float32 [n, 3, F, H, W], still 0..255."""
    check_uint8(videos)
    return rearrange(videos, "n f h w c -> n c f h w").float()


def unchanged(videos: Tensor, size: int) -> Tensor:
    """Return ``videos`` unchanged; raises InputError unless their frames are size x size."""
    if tuple(videos.shape[-2:]) != (size, size):
        height, width = videos.shape[-2:]
        raise InputError(f"resize rule 'none': frames of {height}x{width}; allowed is {size}x{size}")
    return videos


def squash(videos: Tensor, size: int) -> Tensor:
    """Bilinear to size x size with half-pixel centres, changing the aspect ratio (StyleGAN-V, TATS, CD-FVD)."""
    return _by_frame(videos, lambda frames: _interpolate(frames, (size, size), mode="bilinear"))


def legacy_bilinear(videos: Tensor, size: int) -> Tensor:
    """Bilinear to size x size as in TensorFlow 1 (the first FVD code): output pixel i is read at i * in / out, so the
    picture is shifted by up to half a pixel.
    """
    height, width = videos.shape[-2:]
    rows = _legacy_weights(height, size).to(videos)
    columns = _legacy_weights(width, size).to(videos)
    return torch.einsum("ih,bcfhw,jw->bcfij", rows, videos, columns)


def short_side_then_crop(videos: Tensor, size: int) -> Tensor:
    """Bilinear with the short side to ``size`` and the other rounded up, then a centre crop to size x size (VideoGPT,
    DIGAN, PVDM).
    """
    height, width = videos.shape[-2:]
    scale = size / min(height, width)
    target = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
    resized = _by_frame(videos, lambda frames: _interpolate(frames, target, mode="bilinear"))
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return resized[..., top : top + size, left : left + size]


def aligned_corners(videos: Tensor, size: int) -> Tensor:
    """Bilinear to size x size with aligned corner pixels (TGAN2, StyleGAN-V's Inception Score)."""
    return _by_frame(
        videos, lambda frames: _interpolate(frames, (size, size), mode="bilinear", align_corners=True)
    )


def cubic_then_crop(videos: Tensor, size: int) -> Tensor:
    """Bicubic (a = -0.75, as OpenCV's INTER_CUBIC on floats) to a square of size * 8/7, then a centre crop to
    size x size: 128 and 112 in TGAN.
    """
    large = size * 8 // 7
    resized = _by_frame(videos, lambda frames: _interpolate(frames, (large, large), mode="bicubic"))
    start = (large - size) // 2
    return resized[..., start : start + size, start : start + size]


RESIZE_RULES: dict[ResizeRule, Callable[[Tensor, int], Tensor]] = {
    "squash": squash,
    "legacy_bilinear": legacy_bilinear,
    "short_side_then_crop": short_side_then_crop,
    "aligned_corners": aligned_corners,
    "cubic_then_crop": cubic_then_crop,
    "none": unchanged,
}


def _by_frame(videos: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    count = videos.shape[0]
    frames = resize(rearrange(videos, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=count)


def _interpolate(
    frames: Tensor,
    size: tuple[int, int],
    *,
    mode: Literal["bilinear", "bicubic"],
    align_corners: bool = False,
) -> Tensor:
    return functional.interpolate(frames, size=size, mode=mode, align_corners=align_corners, antialias=False)


def _legacy_weights(size: int, wanted: int) -> Tensor:
    """Return the interpolation matrix [wanted, size] of TensorFlow 1's rule."""
    weights = torch.zeros(wanted, size, dtype=torch.float32)
    for row in range(wanted):
        place = row * (size / wanted)
        low = min(int(place), size - 1)
        share = place - low
        weights[row, low] += 1 - share
        weights[row, min(low + 1, size - 1)] += share
    return weights
