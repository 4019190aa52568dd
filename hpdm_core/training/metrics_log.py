"""metrics.jsonl: one line of training statistics per logged step. Over several attempts, each step appears once."""

import json
from pathlib import Path
from typing import Any

from hpdm_core.base.files import trouble_when_unwritable, write_bytes

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends lines to ``folder``/metrics.jsonl. With ``folder`` None it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / "metrics.jsonl" if folder is not None else None

    def start(self, *, step: int, source: Path | None) -> None:
        """Start the file with the lines of ``source`` up to ``step`` and no others.

        ``source`` is the folder of the attempt whose checkpoint training resumes from, None for a fresh
        start. A line that a kill left incomplete is dropped.
        """
        if self.path is None:
            return
        origin = source / "metrics.jsonl" if source is not None else None
        lines: list[str] = []
        if origin is not None and origin.exists():
            for line in origin.read_text().splitlines():
                if _step(line) <= step:
                    lines.append(line + "\n")
        with trouble_when_unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, "".join(lines).encode(), durable=False)

    def write(self, row: dict[str, Any]) -> None:
        """Append ``row``, which must contain ``step``."""
        if self.path is not None:
            with trouble_when_unwritable(self.path), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    """Return the step of a line, infinity for an incomplete one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
