"""Samples as files: uint8 tensors for metrics; videos, GIFs and a contact sheet for viewing.

Sample i is one file ``%06d.safetensors`` with the tensors ``level0`` .. ``level<L-1>``, uint8 [F, H, W, C] =
round((x + 1) * 127.5), and the metadata ``label``. Files are written atomically.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import trouble_when_unwritable, write_bytes

__all__ = [
    "CONTACT_SHEET",
    "batches_to_sample",
    "contact_sheet",
    "from_uint8",
    "list_samples",
    "missing_samples",
    "read_label",
    "read_level",
    "read_sample",
    "sample_path",
    "to_uint8",
    "write_gif",
    "write_mp4",
    "write_sample",
]

CONTACT_SHEET = "contact_sheet.png"
"""The picture of some samples that stands beside videos."""

_NAME = re.compile(r"(\d{6,})\.safetensors")
_VISIBLE_PX = 256  # videos are shown at least this high
_GIF_COLUMNS = 4


def to_uint8(video: Tensor) -> Tensor:
    """Return ``video`` [..., C, F, H, W], clipped to [-1, 1], as uint8 [..., F, H, W, C]."""
    coded = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(coded, "... c f h w -> ... f h w c").contiguous()


def from_uint8(video: Tensor) -> Tensor:
    """Return uint8 ``video`` [..., F, H, W, C] as float32 [..., C, F, H, W] in [-1, 1]."""
    return rearrange(video.to(torch.float32) / 127.5 - 1, "... f h w c -> ... c f h w").contiguous()


def sample_path(folder: Path, index: int) -> Path:
    """Return where sample ``index`` is stored in ``folder``."""
    return folder / f"{index:06d}.safetensors"


def write_sample(folder: Path, index: int, levels: Sequence[Tensor], *, label: int) -> Path:
    """Store ``levels``, each float [C, F_l, H_l, W_l] in [-1, 1], as sample ``index``; return its path.

    Raises `TroubleError` when the disk is full or not writable, as the other writers here do.
    """
    path = sample_path(folder, index)
    tensors = {f"level{level}": to_uint8(video).cpu() for level, video in enumerate(levels)}
    return _write(path, save(tensors, metadata={"label": str(label)}))


def list_samples(folder: Path) -> list[int]:
    """Return the indices of the samples in ``folder``, ascending; an empty list if there is no such folder."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def missing_samples(folder: Path, count: int) -> list[int]:
    """Return which of the samples 0 .. count-1 are not in ``folder``."""
    present = set(list_samples(folder))
    return [index for index in range(count) if index not in present]


def batches_to_sample(missing: Collection[int], count: int, size: int) -> list[list[int]]:
    """Return those batches of samples 0 .. count-1 that contain a ``missing`` sample, each as a whole.

    Batches are aligned to multiples of ``size`` and do not depend on which samples are missing, so that an
    interrupted and resumed run makes the same batches, and bitwise the same samples.
    """
    batches = (range(start, min(start + size, count)) for start in range(0, count, size))
    return [list(batch) for batch in batches if any(index in missing for index in batch)]


def read_sample(folder: Path, index: int) -> list[Tensor]:
    """Return sample ``index``, uint8 [F_l, H_l, W_l, C] per level. Raises `TroubleError` if unreadable."""
    path = sample_path(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(f"level{level}") for level in range(len(file.keys()))]
    except (OSError, SafetensorError) as error:
        raise TroubleError(f"sample {index} cannot be read from {path}: {error}") from error


def read_level(folder: Path, indices: Iterable[int], level: int) -> Tensor:
    """Return ``level`` of samples ``indices``, uint8 [n, F, H, W, C]. Raises `TroubleError` if unreadable."""
    videos = []
    for index in indices:
        path = sample_path(folder, index)
        try:
            with safe_open(path, framework="pt") as file:
                videos.append(file.get_tensor(f"level{level}"))
        except (OSError, SafetensorError) as error:
            raise TroubleError(
                f"level {level} of sample {index} cannot be read from {path}: {error}"
            ) from error
    if not videos:
        raise TroubleError(f"no samples were asked of {folder}; allowed is one or more")
    return torch.stack(videos)


def read_label(folder: Path, index: int) -> int:
    """Return the label of sample ``index``, -1 for none. Raises `TroubleError` if unreadable."""
    path = sample_path(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["label"])
    except (OSError, SafetensorError) as error:
        raise TroubleError(f"sample {index} cannot be read from {path}: {error}") from error


def _rgb(video: Tensor) -> np.ndarray:
    """Return uint8 ``video`` [F, H, W, C] with 3 channels; if C is not 3, each is the mean over channels."""
    array = video.cpu().numpy()
    if array.shape[-1] != 3:
        grey = np.round(array.mean(axis=-1, keepdims=True)).astype(np.uint8)
        array = np.repeat(grey, 3, axis=-1)
    return array


def write_mp4(path: Path, video: Tensor, *, fps: float = 25.0) -> Path:
    """Write uint8 ``video`` [F, H, W, C] as H.264 (yuv420p, plays in any browser); return ``path``.

    A small video is enlarged by an integer factor (pixels repeated) to at least 256 px in height. yuv420p needs
    even sizes, so the last row or column of an odd size is repeated. Raises `InputError` for a video without
    frames.
    """
    import av  # slow to load: only where it is used

    if video.ndim != 4 or 0 in video.shape:
        raise InputError(
            f"{path}: a video of shape {tuple(video.shape)}; allowed is [F, H, W, C], none of them 0"
        )
    frames = _rgb(video)
    factor = -(-_VISIBLE_PX // frames.shape[1])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "15"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return _write(path, made.getvalue())


def write_gif(path: Path, videos: Sequence[Tensor], *, fps: float = 25.0) -> Path:
    """Write uint8 ``videos`` [F, H, W, C], of one size, as a GIF that runs for ever; return ``path``.

    The videos are placed side by side, four in a row, enlarged by an integer factor (pixels repeated) to at least
    128 px in height. A frame lasts an integer number of hundredths of a second, at least two, as the format requires.
    Raises `InputError` for no videos.
    """
    if not videos:
        raise InputError(f"{path}: a picture of no videos; allowed is one or more")
    shown = [_rgb(video) for video in videos]
    frames, height, width = shown[0].shape[:3]
    factor = max(1, -(-128 // height))
    columns, gap = min(_GIF_COLUMNS, len(shown)), 4
    rows = -(-len(shown) // columns)
    high, wide = height * factor + gap, width * factor + gap
    sheet = np.full((frames, rows * high - gap, columns * wide - gap, 3), 255, dtype=np.uint8)
    for place, video in enumerate(shown):
        top, left = place // columns * high, place % columns * wide
        enlarged = video.repeat(factor, axis=1).repeat(factor, axis=2)
        sheet[:, top : top + high - gap, left : left + wide - gap] = enlarged
    # One palette for all frames: a palette per frame would flicker.
    palette = Image.fromarray(sheet.reshape(-1, sheet.shape[2], 3)).quantize(256)
    first, *others = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in sheet
    )
    made = io.BytesIO()
    duration = 10 * max(2, round(100 / fps))
    first.save(made, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return _write(path, made.getvalue())


def contact_sheet(path: Path, samples: Sequence[Sequence[Tensor]], *, frames: int = 4) -> Path:
    """Write a PNG with one row per sample and all its levels side by side; return ``path``.

    ``samples`` holds, per sample and level, uint8 [F_l, H_l, W_l, C]. Each level is shown by ``frames`` frames,
    evenly spaced in time. All levels are shown at the size of the finest (pixels repeated), enlarged to 64 px or
    more in height; the header names a level by its resolution.
    """
    if not samples:
        raise InputError(f"{path}: a contact sheet of no samples; allowed is one or more")
    finest = samples[0][-1]
    factor = max(1, -(-64 // finest.shape[1]))
    height, width = finest.shape[1] * factor, finest.shape[2] * factor
    gap, header = 4, 14
    names = ["x".join(str(size) for size in level.shape[:3]) for level in samples[0]]
    columns = [min(frames, level.shape[0]) for level in samples[0]]
    sheet = Image.new(
        "RGB",
        (sum(count * (width + 1) + gap for count in columns), header + len(samples) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for row, levels in enumerate(samples):
        left = 0
        for name, count, video in zip(names, columns, levels, strict=True):
            if row == 0:
                draw.text((left + 1, 1), name, fill="black")
            times = np.linspace(0, video.shape[0] - 1, count).round().astype(int)
            for frame in _rgb(video)[times]:
                image = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (left, header + row * (height + gap)))
                left += width + 1
            left += gap
    made = io.BytesIO()
    sheet.save(made, format="PNG")
    return _write(path, made.getvalue())


def _write(path: Path, data: bytes) -> Path:
    with trouble_when_unwritable(path):
        write_bytes(path, data)
    return path
