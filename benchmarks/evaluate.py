"""How much memory and time does measuring take?

    python benchmarks/evaluate.py [--threads 1] [--clips 2048] [--i3d-clips 64] [--part NAME ...] [--json]

Each part runs in its own process, so that its peak memory can be measured:

- `random3d`: streamed synthetic clips of 16x64x64. Target: under 2 GB for any number of clips.
- `i3d`: random weights, clips of 16x64x64. Target: peak memory does not grow from half of the clips to all, and at
  least 90 % of the time is spent inside the network (the profile of one clip by torch.profiler is printed too).
- `distances`: the Frechet distance, the kernel distance and the Inception Score on given features.

Prints a table, or one JSON line with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipShape
from hpdm_core.metrics.distances.frechet import distance_between, fit_gaussian
from hpdm_core.metrics.distances.inception_score import inception_score
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.features import extract
from hpdm_core.metrics.networks.detectors import I3DDetector
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.networks.random3d import Random3D
from hpdm_core.metrics.networks.state_dicts import I3D_NAMINGS
from hpdm_core.metrics.networks.weights import uninitialised
from hpdm_core.testing.weights import export, randomise, write_state_dict
from hpdm_plugins.data.readers_pyav import PyAVReader
from hpdm_plugins.data.synthetic import Synthetic

SIZE = ClipShape(16, 64, 64)
MEMORY_LIMIT = 2e9  # bytes
FLAT = 1.02  # limit of the peak at all clips over that at half of them
NETWORK_SHARE = 0.9


def peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clips(count: int) -> Iterator[Tensor]:
    """Draw clips one at a time: uint8 [F, H, W, C]."""
    source = Synthetic(SIZE, PyAVReader())
    for number in range(count):
        video = source.draw("train", generator("benchmark", number)).video
        yield ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


class Watch:
    """Seconds spent inside a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._started = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *given: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *given: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def measured(extractor: Any, count: int, batch: int) -> dict[str, Any]:
    """Stream ``count`` clips through ``extractor``; return speed, and memory after half of them and at the end."""
    peaks: dict[int, int] = {}

    def note(done: int) -> None:
        peaks[done] = peak()

    before = peak()
    start = time.perf_counter()
    features = extract(clips(count), extractor, batch_size=batch, progress=note)
    seconds = time.perf_counter() - start
    half = max(done for done in peaks if done <= max(count // 2, batch))
    return {
        "clips": count,
        "batch": batch,
        "dimension": features.shape[1],
        "seconds": seconds,
        "clips_per_second": count / seconds,
        "bytes_before": before,
        "bytes_at_half": peaks[half],
        "bytes_at_end": peaks[count],
        "end_over_half": peaks[count] / peaks[half],
    }


def random3d(given: argparse.Namespace) -> dict[str, Any]:
    made = measured(Random3D(), given.clips, batch=16)
    return {**made, "holds": made["bytes_at_end"] < MEMORY_LIMIT}


def i3d(given: argparse.Namespace) -> dict[str, Any]:
    network = uninitialised(I3D)
    randomise(network)
    with tempfile.TemporaryDirectory() as folder:
        file = write_state_dict(export(network, I3D_NAMINGS["tensorflow"]), Path(folder) / "weights.npz")
        detector = I3DDetector(weights=str(file))
        loaded, _ = detector._network
    del network
    watch = Watch(loaded)
    made = measured(detector, given.i3d_clips, batch=8)
    made["network_share"] = watch.seconds / made["seconds"]
    made["profile"] = profile(detector)
    made["holds"] = made["end_over_half"] < FLAT and made["network_share"] >= NETWORK_SHARE
    return made


def profile(detector: I3DDetector) -> dict[str, float]:
    """Return the share of each operator's own time in one clip, largest first."""
    clip = next(clips(1))[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        detector.features(clip)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:6]}


def distances(given: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(0)
    reals, fakes = (random.normal(size=(10_000, 400)) @ random.normal(size=(400, 400)) for _ in range(2))
    reference = fit_gaussian(reals)
    logits = random.normal(size=(10_000, 101)) * 5
    work: dict[str, Callable[[], object]] = {
        "fit 10,000 x 400": lambda: fit_gaussian(fakes),
        "frechet, fitted": lambda: distance_between(reference, fit_gaussian(fakes[:2048])),
        "kvd 2,048 x 2,048": lambda: kernel_distance(reals[:2048], fakes[:2048]),
        "inception score 10,000": lambda: inception_score(logits, splits=10, shuffle=True),
    }
    seconds = {}
    for name, run in work.items():
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "bytes_at_end": peak(), "holds": True}


PARTS = {"random3d": random3d, "i3d": i3d, "distances": distances}


def in_its_own_process(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run one part and return what it measured."""
    command = [sys.executable, __file__, "--inside", part, "--threads", str(given.threads)]
    command += ["--clips", str(given.clips), "--i3d-clips", str(given.i3d_clips)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{'part':<10} {'clips':>6} {'clips/s':>8} {'MB, half':>9} {'MB, end':>8} {'in network':>11}  holds"
    )
    for name, row in rows.items():
        if "clips" not in row:
            continue
        share = f"{100 * row['network_share']:.1f} %" if "network_share" in row else ""
        print(
            f"{name:<10} {row['clips']:>6} {row['clips_per_second']:>8.2f} {row['bytes_at_half'] / 1e6:>9.0f} "
            f"{row['bytes_at_end'] / 1e6:>8.0f} {share:>11}  {'yes' if row['holds'] else 'NO'}"
        )
    for key, share in rows.get("i3d", {}).get("profile", {}).items():
        print(f"  i3d, one clip: {100 * share:5.1f} % {key}")
    for name, seconds in rows.get("distances", {}).get("seconds", {}).items():
        print(f"  {name:<24} {seconds:7.3f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--clips", type=int, default=2048, help="clips through random3d")
    parser.add_argument(
        "--i3d-clips", type=int, default=64, help="clips through I3D, about 2 s each on a core"
    )
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside is not None:
        torch.set_num_threads(given.threads)
        print(json.dumps(PARTS[given.inside](given)))
        return 0
    rows = {part: in_its_own_process(part, given) for part in given.part}
    if given.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        print(
            json.dumps(
                {"benchmark": "evaluate", "threads": given.threads, "parts": rows, **machine, **versions}
            )
        )
    else:
        show(rows)
    return 0 if all(row["holds"] for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
