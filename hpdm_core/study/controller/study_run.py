"""What one command is to do with a study: all that its controller is told, besides where cells run."""

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
    """What is to be run."""
    others: Sequence[Cell] = ()
    """Cells of the study that this command leaves alone (``--only``): their workers are not ended."""
    backend: str
    """The name of the backend, which each job's spec keeps."""
    other_backend: Callable[[str], Backend]
    """Builds a backend by its name, to ask for jobs that an earlier command started through it."""
    source: str = ""
    """What the folder keeps as study.yaml."""
    storage: str | None = None
    """URL of the ledger's storage; None for a journal beside the results."""
    budget: Budget = field(default_factory=Budget)
    retry_failed: bool = False
    """Whether failed cells are run again."""
    detach: bool = False
    """Whether the command submits what may be submitted and returns."""
    again: str = ""
    """The command that goes on, for people."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Changes a cell's spec before it is submitted (frozen code)."""
    report: Callable[[Path], str] | None = None
    """Called with the folder at the end; returns text to show."""
    planner: Planner | None = None
    """Adds and ends cells while the study runs."""
