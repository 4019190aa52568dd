"""``python -m hpdm_core.metrics compare A.json B.json``: check whether the numbers of result files are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpdm_core.base.command_line import CommandParser
from hpdm_core.evaluation.results import comparison

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, also if records differ."""
    parser = CommandParser(
        prog="python -m hpdm_core.metrics compare",
        description="Show the numbers of result files, one column per protocol record, and say in which "
        "fields the records differ.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by evaluate --out")
    print(comparison(parser.parse_args(arguments).files))
    return 0
