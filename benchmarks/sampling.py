"""How much faster is sampling with cached contexts, level by level?

    python benchmarks/sampling.py [--cell tiny_clips] [--set KEY=VALUE ...] [--videos 1] [--repeats 3] [--json]

Samples the same videos in three ways in turns, so that other work on the machine slows all of them: `cached` (contexts
of all tiles are kept in memory), `tenth` (a tenth of them; the rest is kept in host memory on CUDA, and in a file on
the CPU) and `uncached` (each distinct parent is run, and each tile's contexts are computed, once per step). All three
run tiles and parents in batches. Prints median seconds per level, the speed-up over uncached, and the ratio of block
runs (the counted patches that went through a block of the backbone), which is the speed-up if only blocks took time.
Outputs that differ by more than 1e-4 are an error. Weights are the initial ones with noise added, since some initial
weights are zero.

By default: h/w overlap, and 16, 16 and 32 Euler steps; any `--set sampling...` is applied after these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from machine import facts
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.runtime import prepare_torch
from hpdm_core.base.errors import report_errors
from hpdm_core.sampling import cache, sample
from hpdm_core.sampling.cascade import label_of

USUAL = (
    "sampling.overlap=[h,w]",
    "sampling.solver.steps=[16,16,32]",
    "sampling.solver.order=[1]",
    "sampling.solver.churn=[0.0]",
)
TOLERANCE = 1e-4
MODES = ("cached", "tenth", "uncached")
CLOCK = time.perf_counter


def lively(assembly: Assembly) -> Any:
    """Return a denoiser with random weights, none of them zero, without gradients."""
    model = assembly.build_model(device=assembly.config.runtime.device).requires_grad_(False).eval()
    drawn = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=drawn).to(parameter.device)
    return assembly.denoiser(model)


class Run:
    """One sampling run: seconds and block runs per level, the videos, and the memory of the cache."""

    def __init__(self, assembly: Assembly, denoiser: Any, videos: int) -> None:
        self.seconds = [0.0] * assembly.pyramid.levels
        self.blocks = [0] * assembly.pyramid.levels
        self.memory = 0
        self._device = torch.device(assembly.config.runtime.device)
        backbone, made = denoiser.model.backbone, cache.CachedContexts._make
        run, count = backbone.run, 0

        def counted(block: int, tokens: Tensor, latents: Tensor, condition: Tensor) -> Any:
            nonlocal count
            count += len(tokens)
            return run(block, tokens, latents, condition)

        def finished(level: int, videos: Tensor) -> None:
            nonlocal count, begun
            now = CLOCK()
            self.seconds[level] += now - begun
            self.blocks[level] += count
            count, begun = 0, CLOCK()

        def noted(contexts: cache.CachedContexts) -> None:
            made(contexts)
            self.memory = max(self.memory, sum(contexts.nbytes.values()))

        backbone.run, cache.CachedContexts._make = counted, noted  # type: ignore[method-assign]
        try:
            indices = range(videos)
            labels = [label_of(index, assembly.config.model.classes) for index in indices]
            begun = CLOCK()
            # Observers get a copy on the CPU, so the device has finished when they are called.
            self.videos = sample(assembly, denoiser, indices, labels, observe=finished)
        finally:
            backbone.run, cache.CachedContexts._make = run, made  # type: ignore[method-assign]


def measure(cell: str, sets: Sequence[str], videos: int, repeats: int) -> dict[str, Any]:
    """Sample ``repeats`` times each way, in turns, after one round that warms up and measures the cache's memory."""

    def assemble(*more: str) -> Assembly:
        return load_cell(cell, sets=[*USUAL, *sets, *more])

    assemblies = {
        "cached": assemble("runtime.cache=contexts"),
        "uncached": assemble("runtime.cache=none"),
    }
    config = assemblies["cached"].config
    device = prepare_torch(config.runtime, config.sampling)
    denoiser = lively(assemblies["cached"])
    memory = Run(assemblies["cached"], denoiser, videos).memory
    tenth = memory / 10 / cache.GIB
    assemblies["tenth"] = assemble("runtime.cache=contexts", f"runtime.cache_memory={tenth}")
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in MODES:
            runs[mode].append(Run(assemblies[mode], denoiser, videos))
    difference = max(
        float((mine - theirs).abs().max())
        for mode in ("cached", "tenth")
        for mine, theirs in zip(runs[mode][0].videos, runs["uncached"][0].videos, strict=True)
    )
    assembly = assemblies["cached"]
    rows = [row(assembly, runs, [level]) for level in range(assembly.pyramid.levels)]
    return {
        "benchmark": "sampling",
        "cell": cell,
        "set": [*USUAL, *sets],
        "videos": videos,
        "repeats": repeats,
        "levels_per_block": list(assembly.levels_per_block),
        "largest_difference": difference,
        "contexts_bytes": memory,
        "rows": [*rows, row(assembly, runs, range(assembly.pyramid.levels))],
        **facts(device),
    }


def row(assembly: Assembly, runs: dict[str, list[Run]], levels: Sequence[int]) -> dict[str, Any]:
    """Return the figures summed over ``levels``."""
    seconds = {
        mode: statistics.median(sum(run.seconds[level] for level in levels) for run in runs[mode])
        for mode in MODES
    }
    blocks = {mode: sum(runs[mode][0].blocks[level] for level in levels) for mode in MODES}
    one = len(levels) == 1
    return {
        "level": "x".join(map(str, assembly.pyramid.size(levels[0]))) if one else "all",
        "tiles": len(assembly.pyramid.tiles(levels[0], assembly.config.sampling.overlap)) if one else None,
        "calls": assembly.solver.calls(levels[0]) if one else None,
        **{f"{mode}_s": seconds[mode] for mode in MODES},
        "speedup": seconds["uncached"] / seconds["cached"],
        "speedup_tenth": seconds["uncached"] / seconds["tenth"],
        "block_runs": blocks["cached"],
        "ideal": blocks["uncached"] / blocks["cached"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="tiny_clips", help="a preset's name or a study file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--videos", type=int, default=1, help="number of videos sampled together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU seconds of one thread, which other work on the machine hardly affects",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    global CLOCK
    CLOCK = time.perf_counter if given.clock == "wall" else time.process_time
    result = measure(given.cell, given.set, given.videos, given.repeats) | {"clock": given.clock}
    if given.json:
        print(json.dumps(result))
    else:
        names = ("level", "tiles", "calls", *(f"{mode}_s" for mode in MODES))
        names += ("speedup", "speedup_tenth", "ideal")
        print(
            f"{given.cell}, {given.videos} video(s), {given.clock} seconds, levels per block: "
            f"{result['levels_per_block']}"
        )
        print("".join(f"{name:>14}" for name in names))
        for each in result["rows"]:
            values = ("" if each[name] is None else each[name] for name in names)
            print("".join(f"{v:>14.3f}" if isinstance(v, float) else f"{v:>14}" for v in values))
        print(
            f"contexts take {result['contexts_bytes'] / 2**20:.1f} MiB; outputs differ by at most "
            f"{result['largest_difference']:.1e}"
        )
    return 0 if result["largest_difference"] <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(report_errors(main))
