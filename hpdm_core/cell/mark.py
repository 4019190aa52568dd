"""How far a cell is, so that two attempts at it can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpdm_core.cell.cell import Cell

__all__ = ["Mark", "mark_of"]

Mark = list[int]


def mark_of(cell: Cell) -> Mark:
    """Return how far ``cell`` is: stages done (as minus those missing), newest checkpoint, videos sampled.

    Greater is further. Names of files only; nothing is read.
    """
    steps = cell.missing()
    checkpoint = videos = 0
    for step in steps:
        found = (path.name for path in step.stage.folder.glob("attempts/*/checkpoints/*"))
        checkpoint = max([checkpoint, *(int(name) for name in found if name.isdecimal())])
        videos += sum(1 for _ in step.stage.folder.glob("*.safetensors"))
    return [-len(steps), checkpoint, videos]
