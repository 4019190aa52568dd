"""The keys of a study file besides the sections of a cell, and what is checked of them without any plugin."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from hpdm_core.base.errors import did_you_mean
from hpdm_core.config.overrides import Layers, lines_of
from hpdm_core.config.problems import Problem, check
from hpdm_core.config.schema import CellConfig, Frozen, Part
from hpdm_core.config.search import SearchKeys

__all__ = ["RESERVED", "SECTIONS", "Budget", "StudyKeys", "check_top_level", "is_reserved"]

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
RESERVED = "'store' is where all studies keep their work; choose another name"
SECTIONS = tuple(name for name in CellConfig.model_fields if name != "seed")
"""The sections of a cell."""

Seed = Annotated[int, Field(ge=0)]
Overrides = dict[str, Any]


class Budget(Frozen):
    """Limits beyond which nothing more is started; null for none."""

    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU hours of all jobs of the study; when they are spent, running jobs are ended with a checkpoint."""
    max_failures: Annotated[int, Field(gt=0)] | None = None
    """Failed cells; what runs goes on to its end."""


class StudyKeys(Frozen):
    """The keys of a study file besides the sections of a cell."""

    name: str | None = None
    """The study's name and that of its results folder; null for the file's."""
    arms: dict[str, Overrides | None] = Field(default_factory=dict)
    """Arm -> its overrides, dotted or nested."""
    baseline: str | None = None
    """The arm that others are compared with; null for the first."""
    factors: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted key -> values; every combination is an arm."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of every arm, each once; each gives one cell of every arm."""
    backend: Part = Part(use="local")
    """Where the cells run; the flag ``--backend`` takes its place."""
    budget: Budget = Budget()
    """Limits of the whole study."""
    storage: str | None = None
    """URL of the ledger's storage; null for a journal file beside the results."""
    scales: dict[str, Overrides | None] = Field(default_factory=dict)
    """Preset -> overrides that hold when the study extends it."""
    search: SearchKeys | None = None
    """What each arm is tuned over before the arms are compared; null for nothing."""


def check_top_level(
    layers: Layers, *, backends: Mapping[str, type[BaseModel]], extra: Collection[str] = ()
) -> tuple[StudyKeys | None, list[str]]:
    """Validate the keys that are no section of a cell; unknown ones get the nearest name. Returns lines.

    ``backends``: the options of each backend that plugins bring.
    """
    own = {key: value for key, value in layers.data.items() if key in StudyKeys.model_fields}
    keys, problems = check(StudyKeys, own)
    allowed = sorted({*StudyKeys.model_fields, *SECTIONS, "extends", "plugins", *extra})
    for key in layers.data:
        if key not in allowed:
            nearest = did_you_mean(key, allowed) or f"; allowed: {', '.join(allowed)}"
            problems.append(Problem((key,), f"unknown key{nearest}"))
    if keys is not None:
        if len(set(keys.seeds)) != len(keys.seeds):
            problems.append(Problem(("seeds",), f"each seed once, got {list(keys.seeds)}"))
        problems += _backend_problems(keys.backend, backends)
        problems += _storage_problems(keys.storage)
        if keys.name is not None and not NAME.fullmatch(keys.name):
            problems.append(Problem(("name",), f"letters, digits and ._- only, got '{keys.name}'"))
        if keys.name is not None and is_reserved(keys.name):
            problems.append(Problem(("name",), RESERVED))
    return keys, lines_of(problems, layers)


def is_reserved(name: str) -> bool:
    """Whether a study's folder would be the store's, also where file names have no case."""
    return name.casefold() == "store"


def _backend_problems(part: Part, backends: Mapping[str, type[BaseModel]]) -> list[Problem]:
    known = tuple(backends)
    if part.use not in known:
        nearest = did_you_mean(part.use, known)
        return [
            Problem(
                ("backend", "use"), f"unknown backend '{part.use}'{nearest}; backends: {', '.join(known)}"
            )
        ]
    _, found = check(backends[part.use], part.options)
    return [Problem(("backend", *each.path), f"{each.message} (option of '{part.use}')") for each in found]


def _storage_problems(url: str | None) -> list[Problem]:
    if url is None or url.startswith("redis"):  # Optuna opens this one itself
        return []
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url).get_dialect()
    except (ArgumentError, ImportError):
        scheme, separator, _ = url.partition("://")
        given = f"{scheme}://..." if separator else url
        allowed = "null for a journal beside the results, or a URL such as sqlite:///ledger.db"
        return [Problem(("storage",), f"'{given}' is no storage that is known here; allowed is {allowed}")]
    return []
