"""``--evaluate-only``: evaluate the cells that are already trained and sampled, and skip all others.

Used for metrics that could not be measured before, for example because their weights were missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpdm_core.base.errors import InputError
from hpdm_core.cell import Cell

__all__ = ["only_evaluations"]

COSTLY = ("train", "sample")


def only_evaluations(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Return the cells that are trained and sampled, and the others.

    Raises InputError when no cell is trained and sampled.
    """
    ready: list[Cell] = []
    rest: list[Cell] = []
    for cell in cells:
        lacks = any(step.name in COSTLY for step in cell.missing())
        (rest if lacks else ready).append(cell)
    if not ready:
        raise InputError(
            f"--evaluate-only: none of {len(cells)} cells is trained and sampled, such as {rest[0].name}; run the "
            "study without it first"
            if rest
            else "--evaluate-only: the study has no cells"
        )
    return ready, rest
