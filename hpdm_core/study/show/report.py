"""The report at the end of a study: made by a process of its own, and only when something in it would change.

Tables, intervals and figures take libraries that a controller does not need for days; and a finished study of ten
thousand cells is looked at in a moment when nothing has happened since.
"""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import read_json, write_json

__all__ = ["report"]

READ = ("index.csv", "study.yaml", "versions.json", "search.json")
"""Files of the study's folder that the report reads whole."""
KEPT = "shown.json"


def report(folder: Path) -> str:
    """Bring the report of the study in ``folder`` up to date and return it as text.

    Raises TroubleError with what the report's own command says.
    """
    made_of = _made_of(folder)
    kept = read_json(folder / "report" / KEPT)
    if kept is not None and kept.get("made_of") == made_of and (folder / "report" / "table.md").exists():
        return str(kept["text"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "hpdm_core.report", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        ours = lines if done.stderr.startswith("error: ") else lines[-1:]
        raise TroubleError(*(ours or [f"ended with code {done.returncode} and no word"]))
    text = done.stdout.rstrip("\n")
    write_json(folder / "report" / KEPT, {"made_of": made_of, "text": text}, durable=False)
    return text


def _made_of(folder: Path) -> str:
    """Return a digest of all that a report depends on: contents of the study's own files, times of the store's."""
    digest = hashlib.sha256()
    for name in READ:
        path = folder / name
        digest.update(path.read_bytes() if path.exists() else b"-")
    for name in _results(folder):
        try:
            digest.update(f"{name} {os.stat(name).st_mtime_ns}\n".encode())  # noqa: PTH116  # many, so no Path
        except OSError:
            digest.update(b"-")
    for path in sorted((Path(__file__).parents[2] / "report").glob("*.py")):
        digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _results(folder: Path) -> Iterator[str]:
    store = folder.resolve().parent / "store"
    try:
        with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield f"{store}/train/{row['train']}/result.json"
                yield f"{store}/samples/{row['samples']}"
                for key in row["evaluations"].split(";"):
                    yield f"{store}/evaluations/{key}/result.json"
    except (OSError, KeyError):
        return
