"""Differences between two arms: configuration keys, and parameters by name and shape.

Sections that training depends on are compared by the cells' specs, with every default filled in. Other sections
(sampling, evaluation), and arms that never ran, are compared by their overrides in ``study.yaml``, which hold all
differences between arms.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from hpdm_core.config.schema import CellConfig
from hpdm_core.report.frame import TRAIN_SECTIONS, CellRecord, StudyResults

__all__ = ["configuration_differences", "pair_lines", "parameter_differences"]

_ABSENT = "(absent)"
_NAMES_SHOWN = 3


def configuration_differences(results: StudyResults, arm: str, *, against: str | None = None) -> list[str]:
    """Return lines ``KEY: OLD -> NEW``, OLD of the arm ``against`` (None: the baseline), NEW of ``arm``."""
    against = results.baseline if against is None else against
    old, new = _spec(results, against), _spec(results, arm)
    if old is not None and new is not None:
        lines = [
            line
            for section in TRAIN_SECTIONS
            for line in _compare(section, old.get(section), new.get(section))
        ]
        skip: tuple[str, ...] = TRAIN_SECTIONS
    else:
        lines, skip = [], ()
    overrides = results.plan.get("arms")
    if isinstance(overrides, Mapping):
        given_old, given_new = overrides.get(against) or {}, overrides.get(arm) or {}
        for key in dict.fromkeys([*given_old, *given_new]):
            if key.split(".")[0] not in skip:
                default = _lookup(results.plan, key)
                lines += _compare(key, given_old.get(key, default), given_new.get(key, default))
    return lines


def parameter_differences(results: StudyResults, arm: str, *, against: str | None = None) -> str | None:
    """Return one line on the parameters that differ from those of ``against`` (None: the baseline).

    None if the weights of either arm are missing.
    """
    pairs = [
        (cell.parameters, other.parameters)
        for cell in results.of_arm(results.baseline if against is None else against)
        for other in results.of_arm(arm)
        if cell.parameters is not None and other.parameters is not None
    ]
    if not pairs:
        return None
    old, new = pairs[0]
    assert old is not None and new is not None, "filtered above"
    parts = []
    for what, names in (
        ("only here", [name for name in new if name not in old]),
        ("missing here", [name for name in old if name not in new]),
        ("of another shape", [name for name in new if name in old and old[name] != new[name]]),
    ):
        if names:
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
            parts.append(f"{len(names)} {what} ({shown})")
    if not parts:
        return f"parameters: the same {len(old)} names and shapes"
    return f"parameters: {_total(old):,} -> {_total(new):,}; " + "; ".join(parts)


def pair_lines(results: StudyResults) -> list[str]:
    """Return one line per pair of arms other than the baseline: the keys and the parameters that differ."""
    lines = []
    others = [arm for arm in results.arms if arm != results.baseline]
    for old, new in itertools.combinations(others, 2):
        changes = configuration_differences(results, new, against=old)
        keys = ", ".join(line.partition(": ")[0] for line in changes) or "no key"
        sizes = parameter_differences(results, new, against=old) or "parameters: no weights to compare"
        lines.append(f"{old} -> {new}: {keys}; {sizes}")
    return lines


def _total(shapes: Mapping[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def _spec(results: StudyResults, arm: str) -> Mapping[str, Any] | None:
    def config(cell: CellRecord) -> Mapping[str, Any] | None:
        found = (cell.spec or {}).get("config")
        return found if isinstance(found, Mapping) else None

    return next((found for cell in results.of_arm(arm) if (found := config(cell)) is not None), None)


def _compare(path: str, old: Any, new: Any) -> list[str]:
    if old == new or _is_newer_neutral(old, new):
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("use") == new.get("use"):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in _compare(f"{path}.{key}", old.get(key, _ABSENT), new.get(key, _ABSENT))
        ]
    return [f"{path}: {_show(old)} -> {_show(new)}"]


def _is_newer_neutral(old: Any, new: Any) -> bool:
    """Whether one of two specs is older and lacks the field, and the other one has it at a neutral value."""
    return (old == _ABSENT and _is_neutral(new)) or (new == _ABSENT and _is_neutral(old))


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ([], (), {})


def _show(value: Any) -> str:
    if isinstance(value, Mapping) and "use" in value:
        options = ", ".join(f"{key}={_show(item)}" for key, item in value.items() if key != "use")
        return f"{value['use']} ({options})" if options else str(value["use"])
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{key}: {_show(item)}" for key, item in value.items() if not _is_neutral(item))
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return str(value)


def _lookup(data: Mapping[str, Any], dotted: str) -> Any:
    """Return the value of a dotted key in ``data``, or else the schema's default."""
    found: Any = data
    for part in dotted.split("."):
        found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
    return _default(dotted) if found == _ABSENT else found


def _default(dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    field = CellConfig.model_fields.get(section)
    if field is None or not isinstance(field.default, BaseModel):
        return _ABSENT
    return field.default.model_dump(mode="json").get(name, _ABSENT)
