"""The state of a study for the user: rows for the display, counts, time left, and index.csv."""

import csv
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdm_core.base.files import write_bytes
from hpdm_core.cell import Cell
from hpdm_core.study.controller.display import Display, Row, seconds_left, span
from hpdm_core.study.controller.tasks import Task

__all__ = ["Overview", "detached", "index_row", "interrupted", "shortfalls", "summary"]

SHARE = 20.0
"""After an update that took t seconds, the next comes 20 t later at the earliest: a large study updates less often."""


class Overview:
    """Shows ``tasks`` and writes index.csv in ``folder``. ``others`` are cells that the command does not run."""

    def __init__(
        self, folder: Path, tasks: Sequence[Task], *, others: Sequence[Cell], display: Display
    ) -> None:
        self.folder = folder
        self.tasks = tasks
        self.display = display
        self.listed: Callable[[], Iterable[tuple[Sequence[str], str]]] | None = None
        """Returns the rows that index.csv lists instead of the tasks, and their states; None lists the tasks."""
        self._others = [(cell, "planned" if cell.missing() else "done") for cell in others]
        self._next_show = self._next_write = float("-inf")
        self._changed = True
        self._spent: list[float] = []
        self._keys: dict[str, list[str]] = {}

    def changed(self, task: Task) -> None:
        """Note that the state of ``task`` has changed."""
        self._changed = True
        if task.state == "done" and task.seconds is not None:
            self._spent.append(task.seconds)

    def show(
        self, progress: Mapping[Task, Mapping[str, Any]], *, slots: int, now: float, force: bool = False
    ) -> None:
        """Show the state of all cells. ``progress``: heartbeats of running tasks; ``now``: the controller's time.

        Does nothing shortly after a slow update, unless ``force`` is set.
        """
        begin = time.perf_counter()
        if not force and begin < self._next_show:
            return
        rows = [
            Row(
                name=task.cell.name,
                state=task.state,
                progress=progress.get(task),
                reason=task.reason.partition("\n")[0],
            )
            for task in self.tasks
        ]
        text = summary(Counter(task.state for task in self.tasks), len(rows))
        left = self._time_left(rows, slots, now)
        if left is not None:
            text += f", about {span(left)} left"
        self.display.update(rows, text)
        end = time.perf_counter()
        self._next_show = end + SHARE * (end - begin) if len(rows) > 100 else end

    def _time_left(self, rows: Sequence[Row], slots: int, now: float) -> float | None:
        """Estimate the seconds left from the cells finished in this command, or before any has, from running stages."""
        waiting = sum(task.state in ("planned", "queued") for task in self.tasks)
        running = [task for task in self.tasks if task.state == "running"]
        if not running and not waiting:
            return None
        stage_left = [left for row in rows if (left := seconds_left(row.progress)) is not None]
        if self._spent:
            usual = sum(self._spent) / len(self._spent)
            rest = sum(max(usual - (now - task.started), 0.0) for task in running) + waiting * usual
        elif stage_left and running:
            elapsed = [now - task.started for task in running]
            rest = sum(stage_left) + waiting * (max(stage_left) + max(elapsed))
        else:
            return None
        return float(rest / max(1, min(slots, len(running) + waiting)))

    def write_index(self, *, force: bool = False) -> None:
        """Write index.csv if something has changed."""
        begin = time.perf_counter()
        if not self._changed or (not force and begin < self._next_write):
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "seed", "train", "samples", "evaluations", "state"])
        rows = [(task.cell, str(task.state)) for task in self.tasks]
        fixed = ((self._fixed(cell), state) for cell, state in [*rows, *self._others])
        for known, state in fixed if self.listed is None else self.listed():
            writer.writerow([*known, state])
        write_bytes(self.folder / "index.csv", text.getvalue().encode())
        self._changed = False
        end = time.perf_counter()
        self._next_write = end + SHARE * (end - begin) if len(rows) > 100 else end

    def _fixed(self, cell: Cell) -> list[str]:
        if cell.identity not in self._keys:
            self._keys[cell.identity] = index_row(cell)
        return self._keys[cell.identity]


def index_row(cell: Cell) -> list[str]:
    """Return a cell's row in index.csv, without its state."""
    keys = cell.keys
    return [cell.arm, str(cell.seed), keys.train, keys.samples, ";".join(keys.evaluations)]


def summary(counts: Mapping[Any, int], total: int) -> str:
    """Return ``3 of 24 cells done, 4 running, 17 queued``."""
    parts = [f"{counts.get('done', 0)} of {total} cells done"]
    for state in ("running", "queued", "failed", "interrupted", "cancelled"):
        if counts.get(state):
            parts.append(f"{counts[state]} {state}")
    return ", ".join(parts)


def interrupted(tasks: Sequence[Task], again: str) -> list[str]:
    """Return the lines shown at the end after Ctrl-C."""
    done = sum(task.state == "done" for task in tasks)
    return [
        f"interrupted: {done} of {len(tasks)} cells done, and nothing of the work is lost.",
        f"To go on, give the same command again:\n  {again}",
    ]


def detached(under_way: int, left: int, again: str) -> list[str]:
    """Return the lines shown at the end of a command with ``--detach``."""
    more = f"; {left} more are submitted when the command is given again" if left else ""
    return [
        f"submitted: {under_way} cells are queued or running{more}.",
        f"To collect, retry and go on, give the command again:\n  {again}",
    ]


def shortfalls(tasks: Sequence[Task]) -> list[str]:
    """Return lines for each cell that ended without its results: why, and where its log is."""
    lines = []
    for task in tasks:
        if task.state in ("failed", "interrupted", "cancelled") and task.cause != "pruned":
            first = f"{task.state}: {task.cell.name}: "
            lines += [f"{first}{line} (log: {task.log})" for line in task.reason.splitlines()]
            lines += [f"    | {line}" for line in task.tail.splitlines()]
    return lines
