"""``arms.png``: generated videos with the same indices from every arm, one row per arm, for visual comparison."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hpdm_core.report.frame import StudyResults

__all__ = ["arms_figure"]

Picture = NDArray[np.uint8]

SAMPLES = 4
FRAMES = 4
_GAP = 2  # pixels between frames; four times as many between samples
_WHITE = 255


def arms_figure(results: StudyResults) -> bytes | None:
    """Return a PNG with a row per arm: samples 0 .. 3 of one seed at the finest level, four frames of each.

    All arms show the same sample indices, which share their noise. None when no arm has stored samples.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {arm: _videos(results, arm) for arm in results.arms}
    shown = {arm: videos for arm, (_, videos) in rows.items() if videos}
    if not shown:
        return None
    indices = sorted({index for videos in shown.values() for index in videos})
    frames, height, width = next(iter(next(iter(shown.values())).values())).shape[:3]
    times = np.unique(np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int))
    strips = {arm: _strip(videos, indices, times, (height, width)) for arm, (_, videos) in rows.items()}
    strip_height, strip_width = next(iter(strips.values())).shape[:2]

    # Enlarge each pixel up to twofold: 64 pixels are small on a screen.
    scale, dpi = max(1.0, min(2.0, 2400 / strip_width)), 100
    names = {
        arm: arm if seed == results.seeds[0] else f"{arm}\n(seed {seed})" for arm, (seed, _) in rows.items()
    }
    left = 0.35 + 0.095 * max(len(line) for name in names.values() for line in name.split("\n"))
    across, down = strip_width * scale / dpi, (strip_height * scale + 8) / dpi
    top = 0.6
    size = (left + across + 0.1, top + down * len(strips) + 0.1)
    figure = Figure(figsize=size, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.1 / size[0],
        1 - 0.22 / size[1],
        f"{results.study}: {frames}x{height}x{width}, seed {results.seeds[0]}, "
        f"frames {', '.join(map(str, times))}",
        fontsize=11,
    )
    for row, (arm, strip) in enumerate(strips.items()):
        bottom = size[1] - top - down * (row + 1)
        axes = figure.add_axes(
            (left / size[0], bottom / size[1], across / size[0], strip_height * scale / dpi / size[1])
        )
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
        axes.set_ylabel(names[arm], rotation=0, ha="right", va="center", fontsize=10, labelpad=6)
        if not rows[arm][1]:
            axes.text(0.5, 0.5, "no samples", transform=axes.transAxes, ha="center", va="center", fontsize=10)
        if row == 0:
            for place, index in enumerate(indices):
                axes.text(
                    (place + 0.5) / len(indices),
                    1.04,
                    f"sample {index}",
                    transform=axes.transAxes,
                    ha="center",
                    va="bottom",
                    fontsize=9,
                )
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _videos(results: StudyResults, arm: str) -> tuple[int, dict[int, Picture]]:
    """Return the first seed that has samples, and its first videos [F, H, W, 3] by index."""
    for cell in results.of_arm(arm):
        found = {}
        for index in range(SAMPLES):
            video = _finest(cell.samples / f"{index:06d}.safetensors")
            if video is not None:
                found[index] = video
        if found:
            return cell.seed, found
    return results.seeds[0], {}


def _finest(path: Path) -> Picture | None:
    try:
        with safe_open(path, framework="numpy") as file:
            video: Picture = file.get_tensor(f"level{len(list(file.keys())) - 1}")
    except (OSError, SafetensorError):
        return None
    if video.shape[-1] == 3:
        return video
    grey = video.mean(axis=-1, keepdims=True).round().astype(np.uint8)
    return np.repeat(grey, 3, axis=-1)


def _strip(
    videos: dict[int, Picture], indices: list[int], times: NDArray[np.int64], size: tuple[int, int]
) -> Picture:
    """Return one row of pictures: the frames ``times`` of the first sample, then of the next."""
    height, width = size
    parts: list[Picture] = []
    for place, index in enumerate(indices):
        if place:
            parts.append(np.full((height, 4 * _GAP, 3), _WHITE, dtype=np.uint8))
        for number, time in enumerate(times):
            if number:
                parts.append(np.full((height, _GAP, 3), _WHITE, dtype=np.uint8))
            video = videos.get(index)
            usable = video is not None and video.shape[1:3] == (height, width) and time < len(video)
            parts.append(
                video[time] if usable and video is not None else np.full((height, width, 3), _WHITE, np.uint8)
            )
    return np.concatenate(parts, axis=1)
