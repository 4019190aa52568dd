"""Where does the time of a training step go?

    python benchmarks/train_step.py [--cell tiny_clips] [--set training.batch=16 ...] [--steps 20]
    [--json]

Times the parts of the trainer's own step one after the other, without prefetch: making the batch, noising,
the first pass (self-conditioning, no gradient), the second pass, loss, backward, clipping, optimizer, weight
average; and, apart from the step, one checkpoint. Medians over steps, the first 5 left out. Prints a table,
or one JSON line with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpdm_core import cost
from hpdm_core.config.compose import load_cell
from hpdm_core.errors import report_errors
from hpdm_core.training.batches import TrainingBatches
from hpdm_core.training.step import joint_loss
from hpdm_core.training.trainer import SETTLING_STEPS, Trainer

PARTS = (
    "make batch",
    "noise and loss",
    "first pass",
    "second pass",
    "backward",
    "clip",
    "optimizer",
    "weight average",
)


class Clock:
    """Adds up seconds per part of a step, waiting for the device at each end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as ``name``."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(trainer: Trainer, steps: int) -> dict[str, float]:
    """Train ``steps`` settled steps; return the median seconds of each part."""
    make, clock = TrainingBatches(trainer.assembly), Clock(trainer.device)
    forward, rows = trainer.model.forward, []

    def timed(entries: Any, contexts: Any = None) -> Any:
        with clock.part("second pass" if torch.is_grad_enabled() else "first pass"):
            return forward(entries, contexts)

    trainer.model.forward = timed
    for step in range(1, SETTLING_STEPS + steps + 1):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        with clock.part("make batch"):
            batch = make(step).to(trainer.device)
        trainer.optimizer.zero_grad(set_to_none=True)
        with clock.part("noise and loss"):
            loss = joint_loss(trainer.assembly, trainer.model, batch)
        clock.seconds["noise and loss"] -= clock.seconds["first pass"] + clock.seconds["second pass"]
        with clock.part("backward"):
            loss.total.backward()
        with clock.part("clip"):
            trainer._clip()
        with clock.part("optimizer"):
            trainer.optimizer.step()
        with clock.part("weight average"):
            trainer.average.update(trainer.model)
        rows.append(clock.seconds)
    trainer.model.forward = forward
    return {name: statistics.median(row[name] for row in rows[SETTLING_STEPS:]) for name in PARTS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="tiny_clips", help="a preset's name or a study file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, repeatable"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    assembly = load_cell(given.cell, sets=given.set)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(assembly, folder=Path(folder))
        parts = measure(trainer, given.steps)
        start = time.perf_counter()
        trainer._save(1)
        checkpoint = time.perf_counter() - start
    whole, batch, flops = sum(parts.values()), assembly.config.training.batch, cost.training_flops(assembly)
    result = {
        "benchmark": "train_step",
        "cell": given.cell,
        "set": given.set,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "seconds": parts,
        "step_seconds": whole,
        "videos_per_second": batch / whole,
        "flops_per_step": flops,
        "flops_per_second": flops / whole,
        "checkpoint_seconds": checkpoint,
        "peak_memory_bytes": trainer.memory.peak(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{given.cell}: batch {batch} on {trainer.device}, {torch.get_num_threads()} thread(s)")
    for name, seconds in parts.items():
        print(f"{name:<16} {1e3 * seconds:>9.2f} ms {seconds / whole:>6.1%}")
    print(
        f"{'step':<16} {1e3 * whole:>9.2f} ms        {batch / whole:.1f} videos/s, {flops / whole:.3g} FLOP/s"
    )
    print(f"{'checkpoint':<16} {1e3 * checkpoint:>9.2f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(report_errors(main))
