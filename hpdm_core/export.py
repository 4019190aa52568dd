"""A trained cell as one file to give away: ``python -m hpdm_core.export STORE/train/KEY --out FILE.safetensors``.

The file holds the averaged weights, the configuration and where they come from. ``python -m hpdm_core.sample FILE``
draws videos from it, and ``training.start_from: {path: FILE}`` starts another training there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import InputError, report_errors

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from hpdm_core.training.trained import PRECISIONS, SUFFIX, export, load_trained

    parser = CommandParser(prog="python -m hpdm_core.export", description="Write a trained cell as one file.")
    parser.add_argument("cell", metavar="CELL_DIR", help="a train stage: STORE/train/KEY")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"the file to write, *{SUFFIX}"
    )
    parser.add_argument(
        "--precision",
        default="float16",
        metavar="NAME",
        help=f"of the weights: {' or '.join(PRECISIONS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--made-by", metavar="COMMAND", help="the command that trains it again, kept in the file"
    )
    given: argparse.Namespace = parser.parse_args(arguments)
    if given.out.suffix != SUFFIX:
        raise InputError(f"--out {given.out}: allowed is a name that ends in {SUFFIX}")
    export(load_trained(given.cell), given.out, precision=given.precision, made_by=given.made_by)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))
