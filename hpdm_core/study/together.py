"""Run the cells of a study one after the other, each in all processes that torchrun started:

    torchrun --nproc-per-node 2 -m hpdm_core.study.together studies/dcf_ablation.yaml --set runtime.strategy=ddp

For one machine with several devices, or several machines that torchrun joins, without a scheduler. All processes work
on each cell (`hpdm_core.cell.cell.Cell.run`). Results go into the usual store; ``python -m hpdm_core.study`` with the
same file then finds the cells done, evaluates what is missing and writes the report. This command runs one cell at a
time, retries nothing and writes no ledger.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpdm_core.base import distributed, interruption
from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import report_errors
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all cells done, 1 failure, 2 invalid input."""
    parser = CommandParser(
        prog="torchrun ... -m hpdm_core.study.together",
        description="Run the cells of a study one after the other, each in all processes of this torchrun.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the study file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm alone")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", dest="plugins")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    given = parser.parse_args(arguments)
    study = load_study(given.file, sets=given.sets, only=given.only, plugins=given.plugins)
    cells, _ = cells_of(study, given.results / "store")
    for cell in cells:
        with interruption.watched(), distributed.joined(cell.config.runtime.device):
            cell.run(_printer(cell.name) if distributed.is_main() else None)
            if distributed.is_main():
                print(f"{cell.name}: done", flush=True)
    return 0


def _printer(name: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that prints a line of progress at each call."""

    def show(progress: dict[str, Any]) -> None:
        place = f" {progress['step']} of {progress['steps']}" if progress.get("steps") else ""
        print(f"{name}: {progress.get('stage', '')}{place}", flush=True)

    return show


if __name__ == "__main__":
    sys.exit(report_errors(main))
