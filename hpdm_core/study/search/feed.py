"""What a search reads from its cells: the curve of a running cell, the objectives of a finished one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdm_core.config.search import Objective

__all__ = ["STANDARD_COLUMNS", "Curve", "objective_name", "objective_of"]

STANDARD_COLUMNS = ("metric", "level", "resolution", "value")


class Curve:
    """A column of a growing metrics.jsonl: step -> value. The file of a newer attempt replaces that of an older one.

    Where the column holds a list (one number per level), the value is the mean over its entries that are numbers.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._path: Path | None = None
        self._offset = 0
        self.values: dict[int, float] = {}

    def read(self, path: Path) -> None:
        """Read the new lines of ``path``; a missing file counts as empty."""
        if path != self._path:
            self._path, self._offset, self.values = path, 0, {}
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]  # the last line may still be being written
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                value = _number(row.get(self._column))
                if value is not None:
                    self.values[int(row["step"])] = value
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return max(self.values, default=0)

    def at(self, look: int, *, every: int) -> float | None:
        """Return the mean over the steps after ``(look - 1) * every`` up to ``look * every``.

        None while step ``look * every`` is not there yet; NaN when there is no value among those steps.
        """
        if self.step < look * every:
            return None
        window = [value for step, value in self.values.items() if (look - 1) * every < step <= look * every]
        return sum(window) / len(window) if window else math.nan


def _number(value: Any) -> float | None:
    if isinstance(value, list):
        found = [item for item in value if isinstance(item, int | float) and not math.isnan(item)]
        return sum(found) / len(found) if found else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def objective_of(results: Mapping[str, Mapping[str, Any]], objective: Objective) -> float | None:
    """Return the mean over the rows of ``results`` (stage -> result) that match ``objective``; None without one."""
    rows = [row for result in results.values() for row in result.get("rows", ()) if _matches(row, objective)]
    rows = _of_level(rows, objective.level)
    extra = {name for row in rows for name in row} - {*STANDARD_COLUMNS, *objective.where}
    for name in sorted(extra):
        without = [row for row in rows if row.get(name) is None]
        rows = without or rows
    values = [float(row["value"]) for row in rows]
    mean = sum(values) / len(values) if values else math.nan
    return None if math.isnan(mean) else mean


def _matches(row: Mapping[str, Any], objective: Objective) -> bool:
    return row.get("metric") == objective.metric and all(
        row.get(name) == value for name, value in objective.where.items()
    )


def _of_level(rows: Sequence[Mapping[str, Any]], level: int | str) -> list[Mapping[str, Any]]:
    levels = sorted({row["level"] for row in rows if row.get("level") is not None})
    if not levels or level == "mean":
        return list(rows)
    wanted = {"finest": levels[-1], "coarsest": levels[0]}.get(str(level), level)
    return [row for row in rows if row.get("level") in (wanted, None)]


def objective_name(objective: Objective) -> str:
    """Return the objective's name as reports show it: ``held_out_loss, finest level, parents=clean``."""
    parts: Iterable[str] = (f"{name}={value}" for name, value in objective.where.items())
    level = f"level {objective.level}" if isinstance(objective.level, int) else f"{objective.level} level"
    if objective.level == "mean":
        level = "mean over levels"
    return ", ".join([objective.metric, level, *parts])
