"""From the design of a study to its cells in a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from hpdm_core.cell import Cell
from hpdm_core.cell_keys import Kin
from hpdm_core.config.study_file import StudyConfig
from hpdm_core.errors import InputError
from hpdm_core.study.design import plan

__all__ = ["cells_of", "refuse_absent"]


def cells_of(study: StudyConfig, store: Path) -> tuple[list[Cell], list[Cell]]:
    """Return the cells that ``--only`` leaves, in the order of their plan, and the others.

    Nothing is read or written. Raises `InputError` when a part's options turn out wrong only now.
    """
    whole = dataclasses.replace(study, selected=tuple(study.arms))
    kin: dict[str, Kin] = {}
    cells = []
    for planned in plan(whole).cells:
        cell = Cell(
            planned.config,
            study.plugins,
            store=store,
            arm=planned.arm,
            study=study.name,
            kin=kin.get(planned.arm),
        )
        kin[planned.arm] = cell.kin
        cells.append(cell)
    chosen = set(study.selected)
    return [cell for cell in cells if cell.arm in chosen], [cell for cell in cells if cell.arm not in chosen]


def refuse_absent(cells: Iterable[Cell]) -> None:
    """Raise `InputError` when a cell needs files that were never there: found before anything is written."""
    lines = dict.fromkeys(line for cell in cells for line in cell.absent())
    if lines:
        raise InputError(*lines)
