"""Where does the time of a training step go, and how much of the machine does it use?

    python benchmarks/train_step.py [--cell tiny_clips] [--set training.batch=16 ...] [--steps 20] [--json]
    python benchmarks/train_step.py --preset hpdm_s [--set training.batch=8] [--steps 1 --settle 0] [--json]

Two kinds of steps take turns: the trainer's own step, for its speed, and the same step with time measured between its
parts, for their shares: data (making the batch), tokenize, read, latent, write, fusion (linear maps and interpolation),
output, the rest of the network, and optimizer (including clipping and weight average). Times of forward and backward
are added. Figures are medians over steps, without the first --settle. Utilisation is the step's counted FLOP/s over
that of a large square matrix product measured between the steps. The FLOPs of the fusion are the difference to a step
without fusion. --preset uses a model's preset, with synthetic data, LAMB and batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import facts
from sections import Laps, watched

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import report_errors
from hpdm_core.training import cost
from hpdm_core.training.batches import Batch, TrainingBatches
from hpdm_core.training.trainer import SETTLING_STEPS, Trainer

MATMUL = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrix product by which the machine's peak speed is measured."""

PRESET_SETS = (
    "data.dataset={use: synthetic, classes: 101}",
    "training.steps=1000",
    "training.batch=1",
    "training.learning_rate=0.005",
    "training.warmup=100",
    "training.optimizer=lamb",
)


class Clock:
    """Seconds since the last call, waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.since = getattr(self, "since", 0.0), time.perf_counter()
        return self.since - before


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the large matrix product, the best of 3."""
    size = MATMUL.get(device.type, 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock, times = Clock(device), []
    for _ in range(4):
        clock.lap()
        left @ right
        times.append(clock.lap())
    return 2 * size**3 / min(times[1:])


def step_parts(trainer: Trainer, batch: Batch, laps: Laps) -> dict[str, float]:
    """Run one step with time measured between its parts; return their seconds."""
    clip = trainer.strategy.clip

    def clipped(*arguments: Any) -> float:
        laps.enter("optimizer")
        return clip(*arguments)

    trainer.strategy.clip = clipped  # type: ignore[method-assign]
    laps.clear()
    try:
        with watched(trainer.model, laps):
            trainer.step(batch)
    finally:
        trainer.strategy.clip = clip  # type: ignore[method-assign]
    laps.enter("optimizer")
    return laps.seconds


def measure(trainer: Trainer, *, steps: int, settle: int) -> dict[str, Any]:
    """Time ``steps`` pairs of steps after ``settle`` pairs."""
    make, laps, clock = TrainingBatches(trainer.assembly), Laps(trainer.device), Clock(trainer.device)
    bf16 = trainer.model.execution.matmul_dtype
    parts: list[dict[str, float]] = []
    whole, rates = [], []
    for number in range(settle + steps):
        clock.lap()
        first = make(2 * number + 1)
        data = clock.lap()
        trainer.step(first)
        whole.append(data + clock.lap())
        second = make(2 * number + 2)
        timed = step_parts(trainer, second, laps)
        parts.append({"data": data, **timed})
        rates.append(matmul_rate(trainer.device, bf16 or trainer.dtype))
    names = parts[0]
    return {
        "seconds": {name: statistics.median(row[name] for row in parts[settle:]) for name in names},
        "step_seconds": statistics.median(whole[settle:]),
        "matmul_flops_per_second": statistics.median(rates[settle:]),
    }


def fusion_flops(sets: Sequence[str], source: str, whole: int) -> float:
    """Return the context fusion's share of a step's FLOPs."""
    bare = [*sets, "model.context_fusion={use: none, coordinates: false}"]
    return 1 - cost.training_flops(load_cell(source, sets=bare)) / whole


def load(given: argparse.Namespace) -> tuple[str, list[str], Assembly]:
    """Return the cell's source, its overrides, and the cell."""
    source = given.preset or given.cell
    sets = [*(PRESET_SETS if given.preset else ()), *given.set]
    return source, sets, load_cell(source, sets=sets)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="tiny_clips", help="name of a complete preset, or a study file")
    parser.add_argument("--preset", metavar="NAME", help="preset of a model: hpdm_s, hpdm_m, hpdm_l")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, repeatable"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--settle", type=int, default=SETTLING_STEPS, help="first steps that are not counted")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    source, sets, assembly = load(given)
    batch, flops = assembly.config.training.batch, cost.training_flops(assembly)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(assembly, folder=Path(folder))
        found = measure(trainer, steps=given.steps, settle=given.settle)
        if not given.preset:
            clock = Clock(trainer.device)
            trainer._save(1)
            found["checkpoint_seconds"] = clock.lap()
    total = sum(found["seconds"].values())
    rate = flops / found["step_seconds"]
    result = {
        "benchmark": "train_step",
        "cell": source,
        "set": given.set,
        "batch": batch,
        "precision": assembly.config.training.precision,
        **found,
        "shares": {name: seconds / total for name, seconds in found["seconds"].items()},
        "videos_per_second": batch / found["step_seconds"],
        "flops_per_step": flops,
        "fusion_flops_share": fusion_flops(sets, source, flops),
        "flops_per_second": rate,
        "utilisation": rate / found["matmul_flops_per_second"],
        "peak_memory_bytes": trainer.memory.peak(),
        **facts(trainer.device),
    }
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{source}: batch {batch} on {result['device']}, {result['threads']} thread(s)")
    for name, seconds in found["seconds"].items():
        print(f"{name:<24} {1e3 * seconds:>9.2f} ms {seconds / total:>6.1%}")
    speed = f"{batch / found['step_seconds']:.2f} videos/s"
    print(f"{'step, no stopwatch':<24} {1e3 * found['step_seconds']:>9.2f} ms  {speed}")
    print(
        f"fusion: {result['shares']['fusion']:.1%} of the time, {result['fusion_flops_share']:.1%} of the FLOPs"
    )
    print(
        f"{rate:.3g} of {found['matmul_flops_per_second']:.3g} FLOP/s of a large matrix product: "
        f"utilisation {result['utilisation']:.1%}"
    )
    if "checkpoint_seconds" in found:
        print(f"{'checkpoint':<24} {1e3 * found['checkpoint_seconds']:>9.2f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(report_errors(main))
