"""What decides, while a study runs, which cells come next: the interface that a search follows.

A planner is asked once per round which cells come next and which running ones are to end; a search is one.
The controller calls ``settled`` exactly once per cell and command.
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
    """Decides while the study runs."""

    def begin(self, storage: Storage) -> None:
        """Take up what an earlier command left in the ledger's storage; called first, under the study's lock."""
        ...

    def rows(self) -> Iterable[tuple[Sequence[str], str]]:
        """Return index.csv's rows, without their state, and their states: what the study is to compare."""
        ...

    def next(self, free: int) -> Sequence[Cell]:
        """Return cells to add to the study now; ``free`` is how many could start at once. With 0, asked once before
        anything else, those that an earlier command may have left running.
        """
        ...

    def ends(self, cell: Cell) -> str | None:
        """Return why the running ``cell`` is to end (it becomes cancelled, cause "pruned"), or None."""
        ...

    def settled(self, cell: Cell, state: State, cause: Cause | None) -> None:
        """Take note that ``cell`` is in a closed state and will not be tried again in this command."""
        ...

    def finished(self) -> bool:
        """Whether no more cells will come."""
        ...
