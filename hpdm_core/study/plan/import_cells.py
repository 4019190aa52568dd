"""``--import``: take finished stages from another results folder by their keys, so that they are not computed again.

A stage is taken whole or not at all, and only after a check: the spec of a trained model must hold the stage's key,
and every file must have the SHA-256 that the stage's result recorded. Files are hard-linked where the file system
allows it (finished files never change), and copied otherwise.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import read_json, sha256_of
from hpdm_core.cell import Cell
from hpdm_core.store.lease import Held
from hpdm_core.store.stages import Stage, Store, is_product

__all__ = ["Importer"]


class Importer:
    """Takes stages from ``source``: a results folder, or the folder of a study in one.

    Raises InputError when it is neither. ``taken`` counts the imported stages by kind; ``refused`` holds a line for
    each stage that failed the check.
    """

    def __init__(self, source: Path) -> None:
        roots = [folder / "store" for folder in (source, source.parent) if (folder / "store").is_dir()]
        if not roots:
            raise InputError(
                f"--import {source}: no results there; allowed is a RESULTS_DIR, or RESULTS_DIR/NAME of a study"
            )
        self._store = Store(roots[0])
        self._seen: set[tuple[str, str]] = set()
        self.taken: dict[str, int] = {}
        self.refused: list[str] = []

    def take(self, cell: Cell) -> None:
        """Take every stage of ``cell`` that is finished there and not here."""
        stages = [each.train_stage for each in (*cell.bases, cell)]
        for stage in (*stages, cell.sample_stage, *(stage for _, stage in cell.evaluation_stages())):
            if (stage.kind, stage.key) in self._seen or stage.done:
                continue
            self._seen.add((stage.kind, stage.key))
            self._take(stage)

    def lines(self) -> list[str]:
        """Return lines for the user: what was imported and what was not."""
        counted = ", ".join(f"{count} {kind}" for kind, count in self.taken.items()) or "nothing"
        return [
            f"imported from {self._store.root}: {counted}",
            *(f"not imported: {line}" for line in self.refused),
        ]

    def _take(self, stage: Stage) -> None:
        there = self._store.stage(stage.kind, stage.key)
        result = there.result()
        if result is None or there.folder.resolve() == stage.folder.resolve():
            return
        problem = self._problem(there, result)
        if problem is not None:
            self.refused.append(f"{there.folder}: {problem}; it is made here instead")
            return
        try:
            with stage.claim() as attempt:
                names = [path.name for path in there.folder.iterdir() if is_product(path)]
                names += ["spec.json"] if stage.kind == "train" else []
                for name in names:
                    _link(there.folder / name, attempt.folder / name)
                attempt.finish(
                    {**result, "imported": str(there.folder)}, files={name: name for name in sorted(names)}
                )
                attempt.log(f"imported from {there.folder}")
        except Held as held:
            self.refused.append(f"{stage.folder}: {held}")
            return
        self.taken[stage.kind] = self.taken.get(stage.kind, 0) + 1

    def _problem(self, stage: Stage, result: dict[str, Any]) -> str | None:
        """Return why the finished ``stage`` fails the check, or None."""
        if stage.kind == "train":
            spec = read_json(stage.folder / "spec.json") or {}
            if spec.get("keys", {}).get("train") != stage.key:
                return "its spec.json has another key"
        recorded: dict[str, str] = result.get("sha256", {})
        if stage.kind != "evaluations" and not recorded:
            return "no hashes were recorded"
        for name, digest in recorded.items():
            path = stage.folder / name
            if path.exists() and sha256_of(path) != digest:  # a missing file was a cache
                return f"{name} is not the file whose hash was recorded"
        return None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
