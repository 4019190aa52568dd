"""How much time does the controller take, per cell and per poll, in a study of thousands of simulated cells?

    python benchmarks/controller.py [--cells 10000] [--failures 0.05] [--slots 256] [--storage URL] [--json]

Controller time is the time of the whole command (reading the study, planning, polling, settling, the ledger, index.csv,
the report) without the time of the simulated backend, which writes the results that workers would write. The command is
then run a second time, on the finished study.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from hpdm_core.study import __main__ as command
from hpdm_core.study import run
from hpdm_core.study.backends.simulated import Simulated
from hpdm_core.study.ledger.ledger import Ledger

SHARES = {"lost node": 0.3, "preempted": 0.2, "out of memory": 0.2, "code error": 0.2, "diverged": 0.1}
"""Class of failure -> its share of all failures."""


def study_of(cells: int, *, failures: float, slots: int, storage: str | None) -> dict[str, Any]:
    """Return a study file's data: two arms, as many seeds as needed for ``cells``, one metric."""
    return {
        "name": "scale",
        "extends": "tiny_clips",
        "arms": {"default": {}, "none": {"model.context_fusion": "none"}},
        "seeds": list(range((cells + 1) // 2)),
        "evaluation": {"metrics": ["held_out_loss"]},
        "storage": storage,
        "backend": {
            "use": "simulated",
            "slots": slots,
            "failures": {name: share * failures for name, share in SHARES.items()},
        },
    }


def measure(cells: int, *, failures: float, slots: int, storage: str | None = None) -> dict[str, Any]:
    """Run the study twice; return figures, with times in seconds."""
    backends: list[Simulated] = []
    make = run.make_backend

    def watched(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        backends.append(made)  # type: ignore[arg-type]
        return made

    run.make_backend = watched
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = folder / "scale.yaml"
            file.write_text(yaml.safe_dump(study_of(cells, failures=failures, slots=slots, storage=storage)))
            arguments = [str(file), "--results", str(folder / "results")]
            first, busy = _timed(arguments)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            again, again_busy = _timed_process(arguments)
            ledger = Ledger(folder / "results" / "simulated" / "scale", study="scale", storage=storage)
            states = Counter(ledger.states().values())
            records = len(ledger.records())
            ledger.close()
    finally:
        run.make_backend = make
    simulating, polls = backends[0].seconds, backends[0].polls
    own = first - simulating
    return {
        "cells": cells,
        "attempts": records,
        "states": dict(states),
        "polls": polls,
        "seconds": first,
        "simulating_seconds": simulating,
        "controller_ms_per_cell": 1000 * own / cells,
        "controller_cpu_ms_per_cell": 1000 * (busy - backends[0].busy) / cells,
        "controller_ms_per_poll": 1000 * own / polls,
        "again_seconds": again,
        "again_cpu_seconds": again_busy,
        "peak_memory_mb": memory,
    }


def _timed(arguments: Sequence[str]) -> tuple[float, float]:
    """Return the wall-clock seconds and the CPU seconds that a command takes."""
    begin = time.perf_counter(), time.process_time()
    command.main(arguments)
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _timed_process(arguments: Sequence[str]) -> tuple[float, float]:
    """The same for a command in its own process, including the process's start."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command_line = [sys.executable, "-m", "hpdm_core.study", *arguments]
    subprocess.run(command_line, check=False, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, busy


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--failures", type=float, default=0.05, help="share of jobs that fail")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--storage", help="URL of the ledger's storage; a journal file without it")
    parser.add_argument(
        "--json", action="store_true", help="print JSON; the study's output goes to standard error"
    )
    given = parser.parse_args(arguments)
    begin = sys.stdout
    sys.stdout = sys.stderr
    try:
        found = measure(given.cells, failures=given.failures, slots=given.slots, storage=given.storage)
    finally:
        sys.stdout = begin
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(tabulate([[name, value] for name, value in found.items()], tablefmt="github", floatfmt=".3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
