"""Where the time of sampling goes, level by level: the contexts, once, and the denoising steps.

    python benchmarks/sampling.py --preset tiny_clips --videos 4 --set sampling.overlap=[h,w] --json out.json

The weights are the initial ones: the time does not depend on them. ``uncached`` is what the level would take
if every distinct parent was encoded, and every tile's contexts were computed, anew at each call: the
contexts' time, measured, times the calls, plus the steps.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from pathlib import Path

import torch

from hpdm_core.config.compose import load_cell
from hpdm_core.errors import report_errors
from hpdm_core.runtime import prepare_torch
from hpdm_core.sampling import sample
from hpdm_core.sampling.cascade import label_of


class Timed:
    """A denoiser that adds up, by level, the seconds spent for contexts and for steps."""

    def __init__(self, denoiser, device):
        self.denoiser = denoiser
        self.sigma_in = denoiser.sigma_in
        self.device = device
        self.seconds = {}
        self.counts = {}
        self.encoding = 0.0  # belongs to the level whose contexts are asked for next
        self.parents = 0

    def encode(self, level, z, *rest):
        """Time a parent's encoding."""
        made, seconds = self._time(self.denoiser.encode, level, z, *rest)
        self.encoding += seconds
        self.parents += len(z)
        return made

    def contexts(self, level, coords, sources):
        """Time a tile batch's contexts."""
        made, seconds = self._time(self.denoiser.contexts, level, coords, sources)
        self._add(level, "contexts", seconds + self.encoding, tiles=len(coords.offset), parents=self.parents)
        self.encoding, self.parents = 0.0, 0
        return made

    def __call__(self, level, z, *rest):
        """Time a step of a tile batch."""
        made, seconds = self._time(self.denoiser, level, z, *rest)
        self._add(level, "steps", seconds, evaluations=len(z))
        return made

    def _time(self, call, *arguments):
        start = time.perf_counter()
        made = call(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return made, time.perf_counter() - start

    def _add(self, level, what, seconds, **counts):
        self.seconds[level, what] = self.seconds.get((level, what), 0.0) + seconds
        for name, count in counts.items():
            self.counts[level, name] = self.counts.get((level, name), 0) + count


def measure(assembly, videos):
    """Return one row per level, seconds for all ``videos`` together."""
    device = prepare_torch(assembly.config.runtime)
    denoiser = assembly.denoiser(assembly.build_model(device=device).requires_grad_(False).eval())
    classes = assembly.config.model.classes
    indices = range(videos)
    labels = [label_of(index, classes) for index in indices]
    for timed in (Timed(denoiser, device), Timed(denoiser, device)):  # the first time warms up
        ends = [time.perf_counter()]
        sample(
            assembly,
            timed,
            indices,
            labels,
            observe=lambda level, made, ends=ends: ends.append(time.perf_counter()),
        )
    durations = [end - start for start, end in itertools.pairwise(ends)]
    levels = assembly.config.model.levels
    rows = []
    for level in range(levels):
        whole = sum(durations[level::levels])  # a level's turn comes once per batch of videos
        contexts = timed.seconds.get((level, "contexts"), 0.0)
        steps = timed.seconds[level, "steps"]
        calls = assembly.solver.calls(level)
        rows.append(
            {
                "level": "x".join(str(size) for size in assembly.pyramid.size(level)),
                "tiles": len(assembly.pyramid.tiles(level, assembly.config.sampling.overlap)),
                "parents": timed.counts.get((level, "parents"), 0) // videos,
                "calls": calls,
                "contexts_s": contexts,
                "steps_s": steps,
                "other_s": whole - contexts - steps,
                "cached_s": whole,
                "uncached_s": whole + (calls - 1) * contexts,
            }
        )
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny_clips", help="a preset's name or a study file")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table with machine and versions")
    given = parser.parse_args(arguments)
    assembly = load_cell(given.preset, sets=given.sets)
    rows = measure(assembly, given.videos)
    total = {"level": "all", "tiles": "", "parents": "", "calls": ""}
    total |= {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_s")}
    print(f"{given.preset}, {given.videos} videos, seconds for all of them together")
    print("".join(f"{name:>13}" for name in rows[0]))
    for row in (*rows, total):
        print("".join(f"{v:>13.3f}" if isinstance(v, float) else f"{v:>13}" for v in row.values()))
    device = assembly.config.runtime.device
    facts = {
        "preset": given.preset,
        "sets": given.sets,
        "videos": given.videos,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [*rows, total],
    }
    if given.json is not None:
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
