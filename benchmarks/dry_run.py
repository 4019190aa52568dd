"""How much CPU time does a dry run take, compared with importing torch alone?

    python benchmarks/dry_run.py [--file studies/dcf_ablation.yaml] [--rounds 5] [--json]

The dry run of the study at its own size and at the paper's (``extends=ucf101_hpdm_s``), and ``import torch``, take
turns, each in its own process. CPU time (user and system) is the minimum over rounds, since other work on the machine
can only add to it. `first line`: seconds until the command prints its first line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import facts
from tabulate import tabulate

PAPER = ["--set", "extends=ucf101_hpdm_s"]


def spent(command: Sequence[str]) -> tuple[float, float]:
    """Return the CPU seconds that a command takes, and the seconds until its first line on standard error."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    # Let Python use its cache of compiled modules, as it does by default, whatever the settings of this process.
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        command, env=usual, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        first = time.perf_counter() - begun
        said = process.stderr.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with code {process.returncode}: {said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, first


def measure(file: Path, rounds: int) -> dict[str, Any]:
    """Return the minimal CPU time of each command."""
    dry = [sys.executable, "-m", "hpdm_core.study", str(file), "--dry-run"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "as it is": dry,
        "at the paper's size": [*dry, *PAPER],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(spent(command))
    least = {name: min(seconds for seconds, _ in each) for name, each in found.items()}
    rows = [
        {"command": name, "seconds": seconds, "of importing torch": seconds / least["import torch"]}
        for name, seconds in least.items()
    ]
    first = min(first for _, first in found["as it is"])
    return {
        "benchmark": "dry_run",
        "file": str(file),
        "rounds": rounds,
        "first_line": first,
        "rows": rows,
        **facts(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=Path("studies/dcf_ablation.yaml"), help="the study")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    given = parser.parse_args(arguments)
    made = measure(given.file, given.rounds)
    if given.json:
        print(json.dumps(made))
        return 0
    print(tabulate(made["rows"], headers="keys", floatfmt=".2f"))
    print(f"first line after {made['first_line']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
