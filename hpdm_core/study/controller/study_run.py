"""What one command does with a study: the controller's input, besides the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdm_core.cell import Cell
from hpdm_core.config.study_keys import Budget
from hpdm_core.study.backends.interface import Backend
from hpdm_core.study.controller.planner import Planner

__all__ = ["StudyRun"]


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One command's work on the study ``name``, whose folder is ``folder``."""

    name: str
    folder: Path
    cells: Sequence[Cell]
    """The cells to run."""
    others: Sequence[Cell] = ()
    """Cells of the study that this command does not run (``--only``); their workers are not ended."""
    backend: str
    """The name of the backend; written to each job's spec."""
    other_backend: Callable[[str], Backend]
    """Builds a backend by name, to poll and cancel jobs that an earlier command started through it."""
    source: str = ""
    """The text of study.yaml in the study's folder."""
    storage: str | None = None
    """URL of the ledger's storage; None for a journal beside the results."""
    budget: Budget = field(default_factory=Budget)
    retry_failed: bool = False
    """Whether failed cells are run again."""
    detach: bool = False
    """Whether the command submits what may be submitted and returns."""
    again: str = ""
    """The command line to show to the user for going on."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Changes a cell's spec before it is submitted (frozen code)."""
    report: Callable[[Path], str] | None = None
    """Called with the study's folder at the end; returns text to show."""
    planner: Planner | None = None
    """Adds and ends cells while the study runs."""
