"""The progress of a cell as a comparable list, to see whether a job got further than an earlier one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpdm_core.cell.cell import Cell

__all__ = ["Mark", "mark_of"]

Mark = list[int]


def mark_of(cell: Cell) -> Mark:
    """Return the progress of ``cell``: minus the number of missing stages, newest checkpoint, videos sampled.

    A greater list is further progress. Lists file names and reads result files only.
    """
    steps = cell.missing()
    checkpoint = videos = 0
    for step in steps:
        found = (path.name for path in step.stage.folder.glob("attempts/*/checkpoints/*"))
        checkpoint = max([checkpoint, *(int(name) for name in found if name.isdecimal())])
        videos += sum(1 for _ in step.stage.folder.glob("*.safetensors"))
    return [-len(steps), checkpoint, videos]
