"""``python -m hpdm_core.report RESULTS_DIR/NAME``: rebuild a study's report from its result files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import report_errors
from hpdm_core.report import write_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(
        prog="python -m hpdm_core.report", description="Rebuild the report of a study from its result files."
    )
    parser.add_argument(
        "study", type=Path, metavar="RESULTS_DIR/NAME", help="the study's folder, with index.csv"
    )
    print(write_report(parser.parse_args(arguments).study))
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
