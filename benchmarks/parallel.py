"""How much faster do two processes train than one?

    python benchmarks/parallel.py [--cell tiny_clips] [--set training.batch=16 ...] [--processes 2]
    [--strategy ddp fsdp] [--steps 10] [--rounds 3] [--json]

Trains the same global batch with one process, and with several under each strategy, with one thread per process, in
turns over several rounds with new processes each time (gloo on the CPU, NCCL on CUDA). Times are those of the trainer's
own step, including making its share of the batch: medians over steps. Ratios are medians of the rounds' ratios. The
ideal speed-up is the number of processes, if there are as many cores or devices.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from machine import facts

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base import distributed
from hpdm_core.base.errors import TroubleError, report_errors

SETTLING = 2


def inside(cell: str, sets: Sequence[str], steps: int) -> None:
    """The work of each process: train and time the steps; the main process prints the median."""
    from hpdm_core.training.batches import TrainingBatches
    from hpdm_core.training.trainer import Trainer

    assembly = load_cell(cell, sets=sets)
    with distributed.joined(assembly.config.runtime.device):
        trainer = Trainer(assembly)
        make, times = TrainingBatches(assembly, trainer.rows), []
        for step in range(1, SETTLING + steps + 1):
            distributed.barrier()
            start = time.perf_counter()
            trainer.step(make(step))  # waits for the device: it returns numbers on the host
            distributed.barrier()
            times.append(time.perf_counter() - start)
        if distributed.is_main():
            print(json.dumps(statistics.median(times[SETTLING:])))


def run(given: argparse.Namespace, strategy: str, processes: int) -> float:
    """Return the seconds of a step with ``processes`` processes under ``strategy``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sets = [*given.set, f"runtime.strategy={strategy}"]
    command = [sys.executable, __file__, "--cell", given.cell, "--steps", str(given.steps), "--inside"]
    command += [word for each in sets for word in ("--set", each)]
    running = []
    for rank in range(processes):
        joined = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        running.append(
            subprocess.Popen(command, env={**os.environ, **joined}, stdout=subprocess.PIPE, text=True)
        )
    shown = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise TroubleError(f"{strategy} on {processes} processes: one of them failed, see above")
    return float(json.loads(shown[0].splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="tiny_clips", help="name of a complete preset, or a study file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, repeatable"
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes of the parallel runs")
    parser.add_argument("--strategy", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        inside(given.cell, given.set, given.steps)
        return 0
    given.set = ["runtime.threads=1", *given.set]
    assembly = load_cell(given.cell, sets=given.set)
    seconds: dict[str, list[float]] = {name: [] for name in ("one process", *given.strategy)}
    for _ in range(given.rounds):
        seconds["one process"].append(run(given, "single", 1))
        for strategy in given.strategy:
            seconds[strategy].append(run(given, strategy, given.processes))
    one, batch = seconds["one process"], assembly.config.training.batch
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "processes": 1 if name == "one process" else given.processes,
            "step_seconds": statistics.median(each),
            "videos_per_second": batch / statistics.median(each),
            "speedup": statistics.median(alone / mine for alone, mine in zip(one, each, strict=True)),
        }
        for name, each in seconds.items()
    ]
    result = {
        "benchmark": "parallel",
        "cell": given.cell,
        "set": given.set,
        "batch": batch,
        "rows": rows,
        **facts(assembly.config.runtime.device),
    }
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{given.cell}: batch {batch}, one thread per process, {result['device']}, {result['cores']} cores")
    for row in rows:
        print(
            f"{row['name']:<12} {row['processes']} x {1e3 * row['step_seconds']:>9.1f} ms per step "
            f"{row['videos_per_second']:>7.2f} videos/s {row['speedup']:>5.2f}x"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(report_errors(main))
