"""What the user sees while a study runs: a live table in a terminal, plain lines otherwise."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "Row", "make_display", "seconds_left", "span"]

PLAIN_SECONDS = 30.0
STYLES = {
    "planned": "dim",
    "queued": "dim",
    "running": "bold",
    "interrupted": "yellow",
    "done": "green",
    "failed": "red",
    "cancelled": "yellow",
}
ORDER = ("running", "failed", "interrupted", "cancelled", "queued", "planned", "done")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell as shown: ``progress`` is the heartbeat of its running stage."""

    name: str
    state: str
    progress: Mapping[str, Any] | None = None
    reason: str = ""


class Display(Protocol):
    """Shows the state of all cells, and single lines."""

    def update(self, rows: Sequence[Row], summary: str) -> None:
        """Show the state of every cell."""
        ...

    def line(self, text: str) -> None:
        """Print a permanent line."""
        ...

    def close(self) -> None:
        """Stop updating; what was shown stays in the terminal."""
        ...


def make_display(console: Console) -> Display:
    """Return a live table for a terminal, plain lines for anything else."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def seconds_left(progress: Mapping[str, Any] | None) -> float | None:
    """Return the seconds left in a stage, from the pace of the current attempt; None while this is not known."""
    if not progress:
        return None
    step, steps = progress.get("step"), progress.get("steps")
    first, since, now = progress.get("first"), progress.get("first_time"), progress.get("time")
    if not (step and steps and since and now) or first is None or step <= first:
        return None
    left: float = (now - since) * (steps - step) / (step - first)
    return max(0.0, left)


def span(seconds: float | None) -> str:
    """Return ``seconds`` as text: ``45 s``, ``12 min``, ``3 h 20 min``; an empty string for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def loss_text(progress: Mapping[str, Any]) -> str:
    """Return the loss in a heartbeat as text: one number, or one per level."""
    loss = progress.get("loss")
    if loss is None:
        return ""
    values = loss if isinstance(loss, (list, tuple)) else [loss]
    return " ".join("-" if value is None else f"{value:.3g}" for value in values)


def step_text(progress: Mapping[str, Any]) -> str:
    """Return the step as text, ``120/2000``, or what the stage is waiting for."""
    if progress.get("waiting"):
        return str(progress["waiting"])
    step, steps = progress.get("step"), progress.get("steps")
    return f"{step}/{steps}" if step is not None and steps else ""


class LiveDisplay:
    """A table that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, rows: Sequence[Row], summary: str) -> None:
        """Draw the table; if not all cells fit, running and failed ones have priority."""
        room = max(5, self._live.console.height - 6)
        shown = list(rows)
        if len(shown) > room:
            chosen = sorted(range(len(rows)), key=lambda index: (ORDER.index(rows[index].state), index))[
                :room
            ]
            shown = [rows[index] for index in sorted(chosen)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("cell", "state", "stage", "step", "loss", "time left"):
            table.add_column(title, no_wrap=title != "step", justify="left")
        for row in shown:
            progress = row.progress or {}
            table.add_row(
                row.name,
                Text(row.state, style=STYLES[row.state]),
                str(progress.get("stage", "")) if row.state == "running" else "",
                step_text(progress) if row.state == "running" else Text(row.reason, style=STYLES[row.state]),
                loss_text(progress),
                span(seconds_left(progress)),
            )
        left = len(rows) - len(shown)
        more = [Text(f"... and {left} more cells", style="dim")] if left else []
        self._live.update(Group(table, *more, Text(summary, style="bold")))

    def line(self, text: str) -> None:
        """Print above the table."""
        self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing; the last table stays."""
        self._live.stop()


class PlainDisplay:
    """Prints lines: at each change of a cell's state or stage, and the progress of all cells every half minute."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._seen: dict[str, tuple[str, str]] = {}
        self._last = clock()
        self._summary = ""
        self._said = ""

    def update(self, rows: Sequence[Row], summary: str) -> None:
        """Print what has changed."""
        first = not self._seen
        self._summary = summary
        for row in rows:
            stage = str((row.progress or {}).get("stage", "")) if row.state == "running" else ""
            now = (row.state, stage)
            before = self._seen.get(row.name)
            self._seen[row.name] = now
            if (
                now == before
                or row.state in ("planned", "queued")
                or (before is None and row.state == "done")
            ):
                continue
            if row.state == "running" and not stage:
                continue  # started, but without progress yet
            self.line(f"{row.name}: {stage or row.state}{': ' + row.reason if row.reason else ''}")
        if first:
            self._summarize()
        elif self._clock() - self._last >= PLAIN_SECONDS:
            for row in rows:
                if row.state == "running" and row.progress:
                    parts = [str(row.progress.get("stage", "")), step_text(row.progress)]
                    if loss := loss_text(row.progress):
                        parts.append(f"loss {loss}")
                    if left := span(seconds_left(row.progress)):
                        parts.append(f"{left} left")
                    self.line(f"{row.name}: {', '.join(part for part in parts if part)}")
            self._summarize()
        else:
            return
        self._last = self._clock()

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Print the summary, unless it was already printed last."""
        if self._summary != self._said:
            self._summarize()

    def _summarize(self) -> None:
        self._said = self._summary
        self.line(self._summary)
