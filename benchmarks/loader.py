"""How many clips per second does a dataset give, drawn one after the other as training does?

    python benchmarks/loader.py [--size 16x64x64] [--seconds 2] [--dataset NAME ...] [--json]

`sample_clips` and `synthetic` are at hand; `video_folder` is timed on two formats that the benchmark writes:
H.264 with a key frame every 12 frames, and MPEG-4 in AVI like UCF-101's files, 320 x 240 pixels, more files
than its cache of decoded frames holds at that size only if --files is large. Prints a table, or one JSON line
with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import torch

from hpdm_core.data.dataset import ClipDataset, ClipShape
from hpdm_core.randomness import generator
from hpdm_plugins.readers_pyav import PyAVReader
from hpdm_plugins.sample_clips import SampleClips
from hpdm_plugins.synthetic import Synthetic
from hpdm_plugins.video_folder import video_folder

CODECS = {
    "h264": ("mp4", "libx264", {"g": "12", "preset": "veryfast"}),
    "mpeg4": ("avi", "mpeg4", {"g": "12", "qscale": "4"}),
}


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


def timed(build: Callable[[], ClipDataset], seconds: float) -> dict[str, float]:
    """Open a dataset and draw for ``seconds``; return the times."""
    start = time.perf_counter()
    dataset = build()
    opened = time.perf_counter() - start
    each = []
    while sum(each) < seconds or len(each) < 3:
        start = time.perf_counter()
        dataset.draw("train", generator("benchmark", "draw", len(each)))
        each.append(time.perf_counter() - start)
    return {
        "open_seconds": opened,
        "clips_per_second": len(each) / sum(each),
        "median_ms": 1e3 * statistics.median(each),
        "slowest_ms": 1e3 * max(each),
        "clips": len(each),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("sample_clips", "synthetic", "video_folder_h264", "video_folder_mpeg4")
    parser.add_argument("--size", default="16x64x64", help="frames x height x width of a clip")
    parser.add_argument("--seconds", type=float, default=2.0, help="drawing time per dataset")
    parser.add_argument("--files", type=int, default=8, help="files of each written folder")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dataset", nargs="+", choices=names, default=names)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shape = ClipShape(*(int(side) for side in given.size.split("x")))
    reader = PyAVReader()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.dataset:
            if name == "sample_clips":
                build: Callable[[], ClipDataset] = lambda: SampleClips(shape, reader)  # noqa: E731
            elif name == "synthetic":
                build = lambda: Synthetic(shape, reader)  # noqa: E731
            else:
                root = write_folder(Path(folder), name.removeprefix("video_folder_"), given.files)
                build = lambda root=root: video_folder(shape, reader, root=root)  # noqa: E731
            rows[name] = timed(build, given.seconds)
    if given.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
        versions = {"torch": torch.__version__, "av": av.__version__}
        about = {"benchmark": "loader", "size": given.size, "threads": given.threads, "files": given.files}
        print(json.dumps({**about, "datasets": rows, **machine, **versions}))
        return 0
    print(f"clips of {given.size}, {given.threads} thread(s)")
    print(f"{'dataset':<20} {'open s':>8} {'clips/s':>9} {'median ms':>10} {'slowest ms':>11}")
    for name, row in rows.items():
        print(
            f"{name:<20} {row['open_seconds']:>8.2f} {row['clips_per_second']:>9.1f} "
            f"{row['median_ms']:>10.2f} {row['slowest_ms']:>11.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
