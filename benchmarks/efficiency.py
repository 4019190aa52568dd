"""How much faster does HPDM train than the same network at full resolution, and in how much less memory?

    python benchmarks/efficiency.py [--cell efficiency_small] [--set KEY=VALUE ...] [--video 16,64,64]
    [--patch 4,16,16] [--batch 4] [--steps 5] [--rounds 3] [--memory GIB] [--json]

Compares three networks of the same widths: `full` (one level whose patch is the whole video: RIN), `hpdm` (patches,
every block on every level) and `hpdm_adaptive` (blocks on levels by the allocation `linear`). They are measured in
turns over several rounds, each in its own process with an allocator that keeps freed memory. Speed is that of the
trainer's step, including self-conditioning, optimizer and weight average, without making batches. Memory is the growth
of the process (CPU) or the memory that PyTorch had allocated (CUDA). Tokens and FLOPs per video are printed too. Ratios
are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from machine import facts

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import report_errors
from hpdm_core.training import cost
from hpdm_core.training.probe import Probe, probe_training

ARMS = ("full", "hpdm", "hpdm_adaptive")


def assemble(given: argparse.Namespace) -> dict[str, Assembly]:
    """Return the three networks."""
    video = f"model.video=[{given.video}]"
    patches = [video, f"model.patch=[{given.patch}]", f"model.levels={given.levels}"]
    sets = {
        "full": [video, f"model.patch=[{given.video}]", "model.levels=1"],
        "hpdm": [*patches, "model.computation_allocation=full"],
        "hpdm_adaptive": [*patches, "model.computation_allocation=linear"],
    }
    return {arm: load_cell(given.cell, sets=[*given.set, *sets[arm]]) for arm in ARMS}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Probe the three networks in turns."""
    assemblies = assemble(given)
    memory = None if given.memory is None else int(given.memory * 2**30)
    probes: dict[str, list[Probe]] = {arm: [] for arm in ARMS}
    for _ in range(given.rounds):
        for arm, assembly in assemblies.items():
            probes[arm].append(probe_training(assembly, batch=given.batch, steps=given.steps, memory=memory))
    rows = []
    for arm, assembly in assemblies.items():
        model = assembly.config.model
        each = probes[arm]
        rows.append(
            {
                "arm": arm,
                "tokens": assembly.pyramid.levels * math.prod(assembly.pyramid.grid),
                "levels_per_block": list(assembly.levels_per_block),
                "parameters": cost.count_parameters(assembly),
                "flops_per_video": cost.training_flops(assembly) / assembly.config.training.batch,
                "videos_per_second": median(given.batch / p.seconds for p in each if p.seconds),
                "peak_bytes": median(p.peak for p in each if p.peak is not None),
                "oom": sum(p.outcome == "oom" for p in each),
                "patch": list(model.patch),
            }
        )
    return {
        "benchmark": "efficiency",
        "cell": given.cell,
        "set": given.set,
        "video": given.video,
        "batch": given.batch,
        "steps": given.steps,
        "rounds": given.rounds,
        "rows": rows,
        "speedup": ratio(probes["full"], probes["hpdm_adaptive"]),
        "speedup_without_adaptive": ratio(probes["full"], probes["hpdm"]),
        "speedup_of_adaptive": ratio(probes["hpdm"], probes["hpdm_adaptive"]),
        "memory": memory_ratio(probes["hpdm_adaptive"], probes["full"]),
        "flops_ratio": rows[0]["flops_per_video"] / rows[2]["flops_per_video"],
        **facts(assemblies["full"].config.runtime.device),
        "threads": assemblies["full"].config.runtime.threads,
    }


def median(values: Any) -> float | None:
    """Return the median, or None for no values."""
    found = list(values)
    return statistics.median(found) if found else None


def ratio(slow: list[Probe], fast: list[Probe]) -> float | None:
    """Return the median over rounds of the second's speed over the first's."""
    pairs = zip(slow, fast, strict=True)
    return median(a.seconds / b.seconds for a, b in pairs if a.seconds and b.seconds)


def memory_ratio(less: list[Probe], more: list[Probe]) -> float | None:
    """Return the median over rounds of the first's peak over the second's."""
    return median(a.peak / b.peak for a, b in zip(less, more, strict=True) if a.peak and b.peak)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="efficiency_small", help="a preset's name or a study file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--video", default="16,64,64", metavar="F,H,W")
    parser.add_argument("--patch", default="4,16,16", metavar="F,H,W")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per probe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory limit of each process")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    result = measure(given)
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{given.cell}, video {given.video}, batch {given.batch}, {result['threads']} thread(s)")
    print(f"{'':<15}{'tokens':>9}{'GFLOP/video':>13}{'videos/s':>10}{'peak MiB':>10}")
    for row in result["rows"]:
        speed, peak = row["videos_per_second"], row["peak_bytes"]
        print(
            f"{row['arm']:<15}{row['tokens']:>9}{row['flops_per_video'] / 1e9:>13.2f}"
            f"{'OOM' if speed is None else format(speed, '.2f'):>10}"
            f"{'OOM' if peak is None else format(peak / 2**20, '.0f'):>10}"
        )
    for name in ("speedup", "speedup_without_adaptive", "speedup_of_adaptive", "memory", "flops_ratio"):
        print(f"{name:<26}{'-' if result[name] is None else format(result[name], '.3f')}")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
