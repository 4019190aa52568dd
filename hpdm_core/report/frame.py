"""A study's result files as one tidy table: a row per number, with its protocol and keys.

Reads only ``index.csv``, ``study.yaml`` and ``versions.json`` of the study's folder, and results, specs and headers of
weight files in the store beside it; loads no plugin. Missing or unreadable results are left out and raise no error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from safetensors import SafetensorError, safe_open

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import read_json

__all__ = ["COLUMNS", "CellRecord", "StudyResults", "by_seed", "load_results", "provenance_of", "versions_of"]

COLUMNS = (
    "study",
    "arm",
    "seed",
    "level",
    "resolution",
    "metric",
    "value",
    "protocol",
    "state",
    "train_key",
    "sample_key",
    "evaluation_key",
    "stale",
)
"""Columns of every table; metrics may add their own. ``stale``: computed with other versions of hpdm or of an installed
plugin than the study was last planned with (changed plugin files change the keys instead)."""

TRAIN_SECTIONS = ("model", "diffusion", "data", "training")


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One planned cell: its row of index.csv, and the results found for it."""

    arm: str
    seed: int
    state: str
    train_key: str
    sample_key: str
    evaluation_keys: tuple[str, ...]
    train: Mapping[str, Any] | None
    spec: Mapping[str, Any] | None
    evaluations: Mapping[str, Mapping[str, Any]]
    weights: Path
    samples: Path
    stale: tuple[str, ...] = ()
    """Versions that have changed since its results were computed: ``NAME OLD, now NEW``."""

    @property
    def complete(self) -> bool:
        """Whether it has all of its numbers."""
        # The train stage is not checked: evaluations prove it, and the user may have deleted it from the store.
        return self.state == "done" or (
            bool(self.evaluation_keys) and len(self.evaluations) == len(self.evaluation_keys)
        )

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]] | None:
        """Name -> shape of every parameter, from the header of the weights; None without weights."""
        try:
            with safe_open(self.weights, framework="numpy") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """A study's cells and its tidy table."""

    study: str
    folder: Path
    baseline: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[CellRecord, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The content of study.yaml."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row per number: `COLUMNS`, then the columns that metrics add. ``level`` is nullable, ``protocol`` JSON."""
        rows = [row for cell in self.cells for row in _rows(self.study, cell)]
        extra = sorted({name for row in rows for name in row} - set(COLUMNS))
        frame = pd.DataFrame(rows, columns=[*COLUMNS, *extra])
        frame["level"] = frame["level"].astype("Int64")
        frame["seed"] = frame["seed"].astype("int64")
        frame["value"] = frame["value"].astype("float64")
        for name in extra:
            if frame[name].map(lambda value: isinstance(value, list | dict)).any():
                frame[name] = frame[name].map(json.dumps)
        return frame

    @property
    def levels(self) -> list[tuple[int, str]]:
        """Levels that have numbers, coarsest first, with their resolutions."""
        found = self.frame[["level", "resolution"]].dropna().drop_duplicates().sort_values("level")
        return [(int(level), str(name)) for level, name in found.itertuples(index=False)]

    @property
    def missing(self) -> list[CellRecord]:
        """Cells without all their numbers."""
        return [cell for cell in self.cells if not cell.complete]

    def of_arm(self, arm: str) -> list[CellRecord]:
        """Return an arm's cells by seed."""
        return sorted((cell for cell in self.cells if cell.arm == arm), key=lambda cell: cell.seed)


def load_results(folder: Path) -> StudyResults:
    """Read the study in ``folder`` (RESULTS_DIR/NAME). Raises InputError when it is not a study's folder."""
    index = folder / "index.csv"
    try:
        with index.open(newline="", encoding="utf-8") as handle:
            lines = list(csv.DictReader(handle))
        store = folder.resolve().parent / "store"
        planned = _versions(read_json(folder / "versions.json"))
        cells = tuple(_cell(store, line, planned) for line in lines)
    except OSError as error:
        raise InputError(
            f"{folder}: not a study's results ({index.name}: {error.strerror}); "
            "allowed is RESULTS_DIR/NAME of a study"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{index}: not an index of cells ({type(error).__name__}: {error})") from error
    if not cells:
        raise InputError(f"{index}: holds no cells; run the study first")
    plan = _plan(folder / "study.yaml")
    arms = tuple(dict.fromkeys(cell.arm for cell in cells))
    baseline = plan.get("baseline")
    return StudyResults(
        study=folder.resolve().name,
        folder=folder,
        baseline=baseline if baseline in arms else arms[0],
        arms=arms,
        seeds=tuple(sorted({cell.seed for cell in cells})),
        cells=cells,
        plan=plan,
    )


def _cell(store: Path, line: Mapping[str, str], planned: Mapping[str, str]) -> CellRecord:
    keys = tuple(key for key in line["evaluations"].split(";") if key)
    train = store / "train" / line["train"]
    found = {key: read_json(store / "evaluations" / key / "result.json") for key in keys}
    result = read_json(train / "result.json")
    used = [_versions((made or {}).get("versions")) for made in (result, *found.values())]
    return CellRecord(
        arm=line["arm"],
        seed=int(line["seed"]),
        state=line["state"],
        train_key=line["train"],
        sample_key=line["samples"],
        evaluation_keys=keys,
        train=result,
        spec=read_json(train / "spec.json"),
        evaluations={key: result for key, result in found.items() if result is not None},
        weights=train / "model.safetensors",
        samples=store / "samples" / line["samples"],
        stale=tuple(dict.fromkeys(change for each in used for change in _changes(each, planned))),
    )


def _versions(data: Any) -> dict[str, str]:
    """Return the versions of hpdm and of installed plugins in a result's ``versions``, or in versions.json."""
    if not isinstance(data, Mapping):
        return {}
    plugins = data.get("plugins")
    found = {**(plugins if isinstance(plugins, Mapping) else {}), "hpdm": data.get("hpdm")}
    return {
        name: version
        for name, version in found.items()
        if isinstance(version, str) and not version.startswith("sha256:")  # file hashes are in the keys
    }


def _changes(used: Mapping[str, str], planned: Mapping[str, str]) -> list[str]:
    own = (used.get("hpdm"), planned.get("hpdm"))
    return [
        f"{name} {old}, now {planned[name]}"
        for name, old in used.items()
        if planned.get(name, old) != old
        # Plugins that are shipped with hpdm change with it: report only hpdm.
        and (name == "hpdm" or (old, planned[name]) != own)
    ]


def _rows(study: str, cell: CellRecord) -> Iterator[dict[str, Any]]:
    for key, result in cell.evaluations.items():
        protocol = json.dumps(result.get("protocol", {}), sort_keys=True)
        for row in result.get("rows", ()):
            yield {
                "level": None,
                "resolution": None,
                **row,
                "study": study,
                "arm": cell.arm,
                "seed": cell.seed,
                "protocol": protocol,
                "state": cell.state,
                "train_key": cell.train_key,
                "sample_key": cell.sample_key,
                "evaluation_key": key,
                "stale": bool(cell.stale),
            }


def _plan(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def by_seed(frame: pd.DataFrame) -> dict[int, float]:
    """Return seed -> value, for ``frame`` with the rows of one arm, level and metric."""
    return {int(seed): float(value) for seed, value in zip(frame["seed"], frame["value"], strict=True)}


def provenance_of(cells: Sequence[CellRecord]) -> dict[str, list[str]]:
    """Return the machines, package versions and git commits that computed the cells' results."""
    machines: set[str] = set()
    commits: set[str] = set()
    for cell in cells:
        for result in (cell.train, *cell.evaluations.values()):
            if not result:
                continue
            machine = result.get("machine")
            if isinstance(machine, dict):
                machines.add(", ".join(f"{key} {value}" for key, value in machine.items()))
            commit = result.get("git")
            if isinstance(commit, str):
                commits.add(commit[:12])
    packages = {
        f"{name} {version}"
        for name, found in versions_of(cells).items()
        if "." not in name
        for version in found
    }
    made = {"machine": sorted(machines), "versions": sorted(packages), "git commit": sorted(commits)}
    return {name: values for name, values in made.items() if values}


def versions_of(cells: Sequence[CellRecord]) -> dict[str, set[str]]:
    """Return package -> the versions that the cells' results were computed with."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        for result in (cell.train, *cell.evaluations.values()):
            versions = (result or {}).get("versions") or {}
            for name, version in {**versions, **(versions.get("plugins") or {})}.items():
                if isinstance(version, str):
                    found.setdefault(name, set()).add(version)
    return found
