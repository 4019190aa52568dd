"""From the design of a study to its cells in a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from hpdm_core.base.errors import InputError
from hpdm_core.cell import Cell
from hpdm_core.cell.keys import Kin
from hpdm_core.config.schema import CellConfig
from hpdm_core.study.plan.design import plan
from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["cells_of", "make_cell", "refuse_absent"]


def cells_of(study: StudyConfig, store: Path) -> tuple[list[Cell], list[Cell]]:
    """Return the cells that ``--only`` leaves, in the order of their plan, and the others.

    Nothing is read or written. Raises `InputError` when a part's options turn out wrong only now.
    """
    whole = dataclasses.replace(study, selected=tuple(study.arms))
    kin: dict[str, Kin] = {}
    cells = []
    for planned in plan(whole).cells:
        cells.append(make_cell(study, planned.config, planned.arm, store, kin))
    chosen = set(study.selected)
    return [cell for cell in cells if cell.arm in chosen], [cell for cell in cells if cell.arm not in chosen]


def make_cell(
    study: StudyConfig, config: CellConfig, arm: str, store: Path, kin: dict[str, Kin] | None = None
) -> Cell:
    """Return the cell ``config`` of ``arm``, with the cells whose models it starts from.

    ``kin`` holds what cells of an arm share, and is added to; None where ``config`` is not the arm's own.
    """
    start = config.training.start_from
    base = None
    if start is not None and start.arm is not None:
        shared = {
            "seed": config.seed,
            "runtime": config.runtime,
        }  # it is trained as the cell is that asks for it
        other = study.configs[start.arm].model_copy(update=shared)
        base = make_cell(study, other, start.arm, store, kin)
    known = None if kin is None else kin.get(arm)
    cell = Cell(config, study.plugins, store=store, arm=arm, study=study.name, kin=known, base=base)
    if kin is not None:
        kin[arm] = cell.kin
    return cell


def refuse_absent(cells: Iterable[Cell]) -> None:
    """Raise `InputError` when a cell needs files that were never there: found before anything is written."""
    lines = dict.fromkeys(line for cell in cells for line in cell.absent())
    if lines:
        raise InputError(*lines)
