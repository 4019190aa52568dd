"""Decode one clip and prepare it by its protocol: uint8 [F, H, W, 3], with facts for warnings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from hpdm_core.base.errors import InputError
from hpdm_core.data.frames import covering_short_side, crop_offsets, scaled_size
from hpdm_core.data.readers import ReadError, VideoReader, check_frames, reason_of
from hpdm_core.evaluation.folders.selection import Choice
from hpdm_core.evaluation.folders.sources import read_array
from hpdm_core.metrics.protocols.records import Preparation

__all__ = ["RANGES", "ClipFacts", "ValueRange", "check_range", "prepared", "read_clip"]

ValueRange = Literal["0..255", "0..1", "-1..1"]
RANGES: dict[ValueRange, tuple[float, float]] = {"0..255": (0, 255), "0..1": (0, 1), "-1..1": (-1, 1)}


@dataclass(frozen=True)
class ClipFacts:
    """Facts of a clip for warnings: its stored size, its size after preparation, its least and greatest value, and
    whether all frames are equal.
    """

    height: int
    width: int
    made_height: int
    made_width: int
    least: int
    most: int
    still: bool


def read_clip(
    choice: Choice, prepare: Preparation, *, reader: VideoReader, values: ValueRange | None = None
) -> tuple[Tensor, ClipFacts]:
    """Return the clip, uint8 [F, H, W, 3], and its facts.

    ``values``: the range of float arrays. Raises ReadError for what cannot be read, InputError for floats whose range
    is not given or differs from ``values``.
    """
    video = choice.video
    if video.kind == "video":
        frames = reader.read(video.path, choice.frames)
    elif video.kind == "frames":
        frames = _pictures(choice)
    else:
        frames = _array(choice, prepare, values)
    height, width = frames.shape[1:3]
    made = prepared(frames, prepare, jpeg=video.jpeg)
    return made, ClipFacts(
        height=height,
        width=width,
        made_height=made.shape[1],
        made_width=made.shape[2],
        least=int(made.min()),
        most=int(made.max()),
        still=bool((made == made[:1]).all()),
    )


def _pictures(choice: Choice) -> Tensor:
    pictures = choice.video.pictures
    check_frames(choice.video.path, choice.frames, len(pictures))
    frames = []
    for number in choice.frames:
        try:
            with Image.open(pictures[number]) as picture:
                frames.append(np.asarray(picture.convert("RGB")))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:  # SyntaxError: a broken PNG
            raise ReadError(pictures[number], reason_of(error)) from error
    if len({frame.shape for frame in frames}) > 1:
        raise ReadError(choice.video.path, "its frames change size")
    return torch.from_numpy(np.stack(frames))


def _array(choice: Choice, prepare: Preparation, values: ValueRange | None) -> Tensor:
    array = read_array(choice.video)
    check_frames(choice.video.path, choice.frames, len(array))
    clip = np.ascontiguousarray(array[list(choice.frames)])
    check_range(clip, choice.video.name, values)
    if clip.dtype != np.uint8:
        low, high = RANGES[values or "0..255"]
        scaled = (clip.astype(np.float64) - low) * (255 / (high - low))
        clip = _quantised(torch.from_numpy(scaled), prepare).numpy()
    tensor = torch.from_numpy(clip)
    return tensor if tensor.shape[-1] == 3 else tensor.expand(*tensor.shape[:-1], 3).contiguous()


def check_range(clip: NDArray[Any], name: str, values: ValueRange | None) -> None:
    """Raise InputError unless ``clip`` holds bytes, or floats within the range ``values``."""
    if clip.dtype == np.uint8:
        return
    if clip.dtype.kind != "f":
        raise InputError(
            f"{name}: holds {clip.dtype}; allowed are uint8 in 0..255, and floats with --value-range"
        )
    low, high = float(clip.min()), float(clip.max())
    if values is None:
        raise InputError(
            f"{name}: holds {clip.dtype} from {low:.3g} to {high:.3g}, whose range is not known; allowed is "
            f"uint8 in 0..255, or give --value-range {' or '.join(RANGES)}"
        )
    least, most = RANGES[values]
    if not (least <= low and high <= most):  # also NaN
        raise InputError(
            f"{name}: holds values from {low:.3g} to {high:.3g}, outside --value-range {values}; clip them, "
            "or give the right range"
        )


def prepared(frames: Tensor, rule: Preparation, *, jpeg: bool = False) -> Tensor:
    """Return ``frames``, uint8 [F, H, W, 3], prepared by ``rule``; ``jpeg``: they come from JPEG files."""
    given = frames
    if not isinstance(rule.size, str) and tuple(frames.shape[1:3]) != rule.size:
        frames = _quantised(_resized(frames, rule, rule.size), rule)
    if rule.average != (1, 1, 1):
        f, h, w = rule.average
        if frames.shape[1] % h or frames.shape[2] % w:
            raise InputError(
                f"preparation: frames of {frames.shape[1]}x{frames.shape[2]} pixels cannot be averaged over {h}x{w}"
            )
        means = reduce(frames.double(), "(f nf) (h nh) (w nw) c -> f h w c", "mean", nf=f, nh=h, nw=w)
        frames = _quantised(means, rule)
    if rule.jpeg_quality is not None and not (jpeg and frames is given):
        frames = torch.from_numpy(np.stack([_coded(frame, rule.jpeg_quality) for frame in frames.numpy()]))
    return frames.contiguous()


def _resized(frames: Tensor, rule: Preparation, size: Sequence[int]) -> Tensor:
    """Return frames resized to ``size``: uint8 from lanczos, floats otherwise."""
    height, width = frames.shape[1:3]
    if rule.crop == "squash":
        scaled, (top, left) = (size[0], size[1]), (0, 0)
    else:
        scaled = scaled_size(height, width, covering_short_side(height, width, size[0], size[1]))
        top, left = crop_offsets(scaled, (size[0], size[1]), None)
    if rule.resize == "lanczos":
        pictures = [
            Image.fromarray(frame).resize((scaled[1], scaled[0]), _LANCZOS) for frame in frames.numpy()
        ]
        made = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    else:
        pixels = rearrange(frames, "f h w c -> f c h w").double()
        mode, smooth = ("area", False) if rule.resize == "area" else ("bilinear", "antialias" in rule.resize)
        options: dict[str, Any] = {} if mode == "area" else {"align_corners": False, "antialias": smooth}
        made = functional.interpolate(pixels, size=scaled, mode=mode, **options)
        made = rearrange(made, "f c h w -> f h w c")
    return made[:, top : top + size[0], left : left + size[1]]


_LANCZOS = Image.Resampling.LANCZOS


def _quantised(values: Tensor, rule: Preparation) -> Tensor:
    """Return ``values`` in 0..255 as uint8."""
    if values.dtype == torch.uint8:
        return values
    # Rounding errors of means and bilinear weights must not truncate 254.99999999999997 to 254.
    near = (values * 2**20).round() / 2**20
    whole = near.round() if rule.quantise == "round" else near.floor()
    return whole.clamp(0, 255).to(torch.uint8)


def _coded(frame: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return ``frame`` [H, W, 3] after JPEG encoding and decoding."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))
