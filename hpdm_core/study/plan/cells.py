"""The cells of a study in a store: every arm with every seed, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpdm_core.base.errors import InputError
from hpdm_core.cell import Cell
from hpdm_core.cell.keys import ArmKeys
from hpdm_core.config.schema import CellConfig
from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["cells_of", "make_cell", "refuse_absent"]


def cells_of(study: StudyConfig, store: Path) -> tuple[list[Cell], list[Cell]]:
    """Return the cells selected by ``--only`` (all without it), and the other cells of the study.

    They are ordered by seed, with the baseline first within each seed, so that arms can be compared early. Nothing is
    read or written. Raises `InputError` when a part rejects its options only now that it is built.
    """
    arms = sorted(study.arms, key=lambda arm: arm != study.baseline)
    shared: dict[str, ArmKeys] = {}
    cells = [
        make_cell(study, study.configs[arm].model_copy(update={"seed": seed}), arm, store, shared)
        for seed in study.seeds
        for arm in arms
    ]
    chosen = set(study.selected)
    return [cell for cell in cells if cell.arm in chosen], [cell for cell in cells if cell.arm not in chosen]


def make_cell(
    study: StudyConfig, config: CellConfig, arm: str, store: Path, arm_keys: dict[str, ArmKeys] | None = None
) -> Cell:
    """Return the cell ``config`` of ``arm``, with the cells whose models it starts from.

    ``arm_keys`` caches the keys that the cells of an arm share; entries are added. Pass None where ``config`` differs
    from the arm's own configuration in more than the seed.
    """
    start = config.training.start_from
    base = None
    if start is not None and start.arm is not None:
        shared = {
            "seed": config.seed,
            "runtime": config.runtime,
        }  # the base is trained with the same seed and runtime settings as this cell
        other = study.configs[start.arm].model_copy(update=shared)
        base = make_cell(study, other, start.arm, store, arm_keys)
    known = None if arm_keys is None else arm_keys.get(arm)
    cell = Cell(config, study.plugins, store=store, arm=arm, study=study.name, arm_keys=known, base=base)
    if arm_keys is not None:
        arm_keys[arm] = cell.arm_keys
    return cell


def refuse_absent(cells: Iterable[Cell]) -> None:
    """Raise `InputError` when a cell needs files that do not exist and are in no earlier record.

    Called before anything is written.
    """
    lines = dict.fromkeys(line for cell in cells for line in cell.absent())
    if lines:
        raise InputError(*lines)
