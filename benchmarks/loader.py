"""How fast are clips loaded from video files, and does a training step wait for them?

    python benchmarks/loader.py [--size 64x240x320] [--seconds 3] [--files 8] [--workers 2] [--step-ms 100]
    [--json]

Writes two folders of videos with 150 frames of 240 x 320 pixels: H.264 with a key frame every 12 frames, and MPEG-4 in
AVI like UCF-101's files. One core draws clips from each folder, one after the other, and cuts a patch of each of three
levels out of every clip, as in training. `cold` decodes every clip (the dataset's in-memory cache of frames is off);
`cached` reads frames from the clip cache on disk (`runtime.clip_cache`) after one round that filled it. `patches` times
the cutting alone, from a decoded clip: `whole first` converts the whole clip to float32 before cutting, `as cut` only
the cut-out pixels. Then a simulated trainer that takes `--step-ms` for a step of `--batch` clips asks for batches made
in its own process, by a thread, and by `--workers` processes: `wait` is the time that a step waits for its batch,
without the first steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import torch
from machine import facts
from torch import Tensor

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import report_errors
from hpdm_core.base.randomness import generator
from hpdm_core.data import file_clips
from hpdm_core.data.clip_cache import CachedReader
from hpdm_core.data.dataset import ClipDataset, ClipShape
from hpdm_core.data.frames import to_pixels, to_video
from hpdm_core.pyramid import Pyramid, level_patch
from hpdm_core.training.batches import loaded
from hpdm_plugins.data.readers_pyav import PyAVReader
from hpdm_plugins.data.synthetic import Synthetic
from hpdm_plugins.data.video_folder import video_folder

CODECS = {
    "h264": ("mp4", "libx264", {"g": "12", "preset": "veryfast"}),
    "mpeg4": ("avi", "mpeg4", {"g": "12", "qscale": "4"}),
}
SETTLING = 4
GIB = 2**30


def write_folder(root: Path, codec: str, files: int) -> Path:
    """Write ``files`` synthetic videos of 150 frames, 240 x 320 pixels, and return their folder."""
    suffix, encoder, options = CODECS[codec]
    folder = root / codec
    folder.mkdir()
    source = Synthetic(ClipShape(150, 240, 320), PyAVReader())
    for number in range(files):
        clip = source.draw("train", generator("benchmark", number)).video
        frames = ((clip + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
        with av.open(str(folder / f"{number:04d}.{suffix}"), "w") as container:
            stream = container.add_stream(encoder, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def pyramid_of(shape: ClipShape) -> Pyramid:
    """Return a pyramid of three levels, each twice as fine as the one before."""
    video = (shape.frames, shape.height, shape.width)
    frames, height, width = (size // 4 for size in video)
    return Pyramid(video=video, patch=(frames, height, width), token=(1, 1, 1), levels=3)


def cut(pixels: Tensor, pyramid: Pyramid) -> list[Tensor]:
    """Return the centre patch of every level."""
    made = []
    for level in range(pyramid.levels):
        f, h, w = (
            (size - patch) // 2 for size, patch in zip(pyramid.size(level), pyramid.patch, strict=True)
        )
        made.append(level_patch(pixels, pyramid, level, (f, h, w), "area"))
    return made


def draws(dataset: ClipDataset, pyramid: Pyramid, seconds: float) -> dict[str, float]:
    """Draw and cut clips for ``seconds``; return clips per second of CPU time and of wall-clock time."""
    each: list[float] = []
    begun = time.process_time()
    while sum(each) < seconds or len(each) < 3:
        start = time.perf_counter()
        cut(dataset.draw("train", generator("benchmark", "draw", len(each))).pixels, pyramid)
        each.append(time.perf_counter() - start)
    return {
        "clips_per_second": len(each) / sum(each),
        "clips_per_cpu_second": len(each) / (time.process_time() - begun),
        "median_ms": 1e3 * statistics.median(each),
    }


def patches_ms(shape: ClipShape, rounds: int = 9) -> dict[str, float]:
    """Return the median milliseconds of CPU time to cut a patch of each level from a decoded clip."""
    pyramid = pyramid_of(shape)
    frames = torch.randint(256, (*pyramid.video, 3), dtype=torch.uint8)
    ways = {
        "whole first": lambda: cut(to_video(frames), pyramid),
        "as cut": lambda: cut(to_pixels(frames), pyramid),
    }
    found = {}
    for name, way in ways.items():
        each = []
        for _ in range(rounds):
            begun = time.process_time()
            way()
            each.append(time.process_time() - begun)
        found[name] = 1e3 * statistics.median(each)
    return found


def folder_rows(shape: ClipShape, root: Path, cache: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Time one folder, with decoding and from the cache."""
    file_clips.FrameCache.__init__.__defaults__ = (0,)  # type: ignore[attr-defined]  # no in-memory cache: every draw reads
    plain = video_folder(shape, PyAVReader(), root=root)
    kept = video_folder(shape, CachedReader(PyAVReader(), cache, limit=20 * GIB), root=root)
    pyramid = pyramid_of(shape)
    cold = draws(plain, pyramid, seconds)
    draws(kept, pyramid, 3 * seconds)  # fills the cache
    return {"cold": cold, "cached": draws(kept, pyramid, seconds)}


def waits(given: argparse.Namespace, root: Path, cache: Path) -> dict[str, float]:
    """Return way of making batches -> median milliseconds that a step waits for its batch."""
    frames, height, width = given.size.split("x")
    sets = [
        f"data.dataset={{use: video_folder, root: {root}}}",
        "model.classes=0",
        f"model.video=[{frames},{height},{width}]",
        f"model.patch=[{int(frames) // 4},{int(height) // 4},{int(width) // 4}]",
        "model.token=[1,1,1]",
        f"training.batch={given.batch}",
    ]
    ways = {
        "here": ["runtime.prefetch=0"],
        "thread": ["runtime.prefetch=2"],
        "workers": [f"runtime.workers={given.workers}"],
        "workers, cached": [f"runtime.workers={given.workers}", f"runtime.clip_cache={cache}"],
    }
    found = {}
    for way, more in ways.items():
        source = loaded(load_cell("tiny_clips", sets=[*sets, *more]), range(1, given.steps + SETTLING + 1))
        each = []
        for _ in itertools.repeat(None, given.steps + SETTLING):
            start = time.perf_counter()
            next(source)
            each.append(time.perf_counter() - start)
            time.sleep(given.step_ms / 1e3)  # stands for a GPU's step, which leaves the CPU idle
        source.close()  # type: ignore[attr-defined]  # a generator
        found[way] = 1e3 * statistics.median(each[SETTLING:])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="64x240x320", help="frames x height x width of a clip")
    parser.add_argument("--seconds", type=float, default=3.0, help="drawing time per folder, cold and cached")
    parser.add_argument("--files", type=int, default=8, help="number of files in each folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="clips per step when waiting is timed")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--step-ms", type=float, default=100.0, help="duration of a step without waiting")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = ClipShape(*(int(side) for side in given.size.split("x")))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        roots = {codec: write_folder(folder, codec, given.files) for codec in CODECS}
        for codec, root in roots.items():
            rows[codec] = folder_rows(shape, root, folder / "cache", given.seconds)
        waited = waits(given, roots["h264"], folder / "cache")
    result = {
        "benchmark": "loader",
        "size": given.size,
        "files": given.files,
        "folders": rows,
        "patches_ms": patches_ms(shape),
        "batch": given.batch,
        "step_ms": given.step_ms,
        "workers": given.workers,
        "wait_ms": waited,
        **facts(),
        "av": av.__version__,
    }
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"clips of {given.size} from {given.files} files of 240x320, one core")
    print(f"{'':<16}{'clips/s':>9}{'clips/CPU s':>13}{'median ms':>11}")
    for codec, ways in rows.items():
        for way, row in ways.items():
            print(
                f"{codec + ' ' + way:<16}{row['clips_per_second']:>9.1f}{row['clips_per_cpu_second']:>13.1f}"
                f"{row['median_ms']:>11.2f}"
            )
    print("cutting a patch of each level from a decoded clip, CPU ms:")
    for way, spent in result["patches_ms"].items():
        print(f"{way:<16}{spent:>9.1f}")
    print(f"waiting time per step of {given.step_ms:g} ms and {given.batch} clips, median ms:")
    for way, wait in waited.items():
        print(f"{way:<16}{wait:>9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
