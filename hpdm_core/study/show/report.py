"""The report at the end of a study: made in a separate process, and only when its content would change.

The separate process spares the controller, which may run for days, the libraries for tables, intervals and figures.
Keeping an unchanged report lets the command on a finished study of ten thousand cells return at once.
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

    Raises TroubleError with the error messages of ``python -m hpdm_core.report``.
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
        raise TroubleError(*(ours or [f"ended with code {done.returncode} and no message"]))
    text = done.stdout.rstrip("\n")
    write_json(folder / "report" / KEPT, {"made_of": made_of, "text": text}, durable=False)
    return text


def _made_of(folder: Path) -> str:
    """Return a digest of what a report depends on: contents of the study's files, modification times of results."""
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
