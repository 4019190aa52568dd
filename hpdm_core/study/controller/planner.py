"""The interface of a planner, which adds and ends cells while a study runs; a search is one.

In each round the controller asks the planner which cells come next and which running ones are to end. It calls
``settled`` exactly once per cell and command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from hpdm_core.cell import Cell
from hpdm_core.store.failures import Cause
from hpdm_core.study.controller.states import State
from hpdm_core.study.ledger.storage import Storage

__all__ = ["Planner"]


class Planner(Protocol):
    """Adds and ends cells while the study runs."""

    def begin(self, storage: Storage) -> None:
        """Load what an earlier command left in the ledger's storage; called first, under the study's lock."""
        ...

    def rows(self) -> Iterable[tuple[Sequence[str], str]]:
        """Return (row without its state, state) for each row of index.csv: the cells that the study compares."""
        ...

    def next(self, free: int) -> Sequence[Cell]:
        """Return cells to add to the study now; ``free`` is how many could start at once.

        Called once with 0 before anything else, to get the cells that an earlier command may have left running.
        """
        ...

    def ends(self, cell: Cell) -> str | None:
        """Return why the running ``cell`` is to end (it becomes cancelled, cause "pruned"), or None."""
        ...

    def settled(self, cell: Cell, state: State, cause: Cause | None) -> None:
        """Note that ``cell`` is in a closed state and will not be tried again in this command."""
        ...

    def finished(self) -> bool:
        """Whether no more cells will come."""
        ...
