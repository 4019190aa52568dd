"""Validates a merged configuration: returns a `CellConfig`, or a list of all problems.

Keys and types are checked by the schema, parts and their options by the plugins. Relations between values are
checked by building the cheap parts (pyramid, allocation, input scales, samplers, solver) and the network on the
meta device. No data is opened.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hpdm_core.base.errors import HpdmError
from hpdm_core.config.overrides import Layers, lines_of
from hpdm_core.config.problems import KeyPath, Problem, check, field_of
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.plugins import FAMILIES, Plugins

__all__ = ["validate_cell"]

METRICS: KeyPath = ("evaluation", "metrics")
STEPS: KeyPath = ("training", "steps")
KEY_FIRST = re.compile(r"([a-z_]+(?:\.\w+)*): ")
"""The beginning of a message that names the wrong key itself."""

LIGHT_PARTS: dict[str, KeyPath] = {
    "pyramid": ("model",),
    "levels_per_block": ("model", "computation_allocation"),
    "sigma_in": ("diffusion", "noise_scaling"),
    "objective": ("diffusion", "objective"),
    "noise_sampler": ("diffusion", "noise_sampling"),
    "coordinate_sampler": ("training", "coordinate_sampling"),
    "solver": ("sampling", "solver"),
}
"""Properties of an Assembly that are cheap to build, and the key to report if building fails."""

SIZES: tuple[KeyPath, ...] = tuple(("model", name) for name in ("video", "patch", "token", "levels"))
BETWEEN: dict[str, tuple[KeyPath, ...]] = {
    "pyramid": SIZES,
    "levels_per_block": (("model", "blocks"), ("model", "levels")),
    "sigma_in": (("model", "levels"),),
    "noise_sampler": (("model", "levels"),),
    "coordinate_sampler": SIZES,
    "solver": (("model", "levels"), ("diffusion", "noise_scaling")),
    "network": (("model", "backbone"), ("model", "token_dim"), ("model", "blocks"), *SIZES),
}
"""The other keys that each of them is built from."""

NEEDS: dict[str, tuple[str, ...]] = {
    "noise_sampler": ("sigma_in",),
    "coordinate_sampler": ("pyramid",),
    "solver": ("sigma_in",),
}


def validate_cell(layers: Layers, plugins: Plugins) -> tuple[CellConfig | None, list[str]]:
    """Return the cell that ``layers`` describe, with defaults filled in, or None and one line per problem.

    Top-level keys that do not belong to a cell, such as ``arms``, are ignored.
    """
    data = {key: copy.deepcopy(layers.data[key]) for key in CellConfig.model_fields if key in layers.data}
    problems: list[Problem] = []
    refused: set[KeyPath] = set()
    for path, family in _places(data):
        part, found = _part_at(data, path, plugins, family)
        problems.extend(found)
        if part is None:
            refused.add(path)
        else:
            _put(data, path, {"use": part.use, "options": part.options})
    config, found = check(CellConfig, data)
    # A part with a reported problem is not reported again.
    problems.extend(
        problem if problem.path else _blamed(problem.message, (), ())
        for problem in found
        if problem.path not in refused
    )
    if config is not None and not problems:
        problems = _relations(config, plugins)
    return (None if problems else config), lines_of(_ordered(problems), layers)


def _ordered(problems: list[Problem]) -> list[Problem]:
    sections = list(CellConfig.model_fields)

    def rank(problem: Problem) -> int:
        top = problem.path[0] if problem.path else ""
        return sections.index(str(top)) if top in sections else -1

    return sorted(problems, key=rank)


def _places(data: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and family of every part of a cell, given or left to its default."""
    for family in FAMILIES.values():
        if not family.of_cell:
            continue
        section, _, name = family.path.partition(".")
        inside = data.get(section, {})
        if not isinstance(inside, Mapping) or (section not in data and _required(section)):
            continue
        if name == "metrics.*":
            listed = inside.get("metrics")
            if isinstance(listed, list | tuple):
                yield from (((*METRICS, index), family.name) for index in range(len(listed)))
        elif "*" not in name:
            yield (section, name), family.name


def _required(section: str) -> bool:
    return CellConfig.model_fields[section].is_required()


def _default(path: KeyPath) -> Part | None:
    model = field_of(CellConfig, path[:-1])
    if model is None or not isinstance(path[-1], str):
        return None
    default = model.model_fields[path[-1]].default
    return default if isinstance(default, Part) else None


def _part_at(
    data: Mapping[str, Any], path: KeyPath, plugins: Plugins, family: str
) -> tuple[Part | None, list[Problem]]:
    """Return the checked part at ``path`` and its problems; None for the part if it cannot be checked."""
    default = _default(path)
    value: Any = data
    for step in path:
        if isinstance(value, Mapping) and step not in value:
            value = default
            break
        value = value[step]
    if value is None and default is None and isinstance(path[-1], str):
        return None, [
            Problem(path, f"missing; give one of {', '.join(plugins.keys(family)) or 'no registered part'}")
        ]
    if isinstance(value, Mapping) and "use" not in value and default is not None:
        value = {"use": default.use, **value}
    if isinstance(value, Mapping) and isinstance(value.get("use"), str):
        value = Part(use=value["use"], options={key: item for key, item in value.items() if key != "use"})
    elif isinstance(value, str):
        value = Part(use=value)
    if not isinstance(value, Part):
        return None, [Problem(path, f"should be NAME or {{use: NAME, option: value}}, got {value!r}")]
    part, problems = plugins.check(family, value, path)
    return part, problems


def _put(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    inside: Any = data
    for step in path[:-1]:
        inside = inside.setdefault(step, {}) if isinstance(inside, dict) else inside[step]
    inside[path[-1]] = value


def _relations(config: CellConfig, plugins: Plugins) -> list[Problem]:
    """Return problems of combinations of values that are each valid on their own."""
    from hpdm_core.assembly.assembly import Assembly

    problems = []
    if config.diffusion.sigma_min >= config.diffusion.sigma_max:
        low, high = config.diffusion.sigma_min, config.diffusion.sigma_max
        limits: tuple[KeyPath, ...] = (("diffusion", "sigma_min"), ("diffusion", "sigma_max"))
        problems.append(Problem(limits[0], f"should be below sigma_max {high}, got {low}", limits))
    steps = config.training.steps
    problems += [
        Problem(
            ("training", "keep", index), f"should be at most training.steps {steps}, got {kept}", (STEPS,)
        )
        for index, kept in enumerate(config.training.keep)
        if kept > steps
    ]
    problems += [
        Problem(
            (section, "attention"),
            f"should be null with precision fp64, got '{stage.attention}'",
            ((section, "precision"),),
        )
        for section, stage in (("training", config.training), ("sampling", config.sampling))
        if stage.precision == "fp64" and stage.attention is not None
    ]
    try:
        torch.device(config.runtime.device)
    except RuntimeError:
        said = f"should be a device such as cpu, cuda or cuda:1, got '{config.runtime.device}'"
        problems.append(Problem(("runtime", "device"), said))
    assembly = Assembly(config, plugins)
    failed: set[str] = set()
    for name, path in LIGHT_PARTS.items():
        if failed & set(NEEDS.get(name, ())):
            continue
        try:
            getattr(assembly, name)
        except HpdmError as error:
            failed.add(name)
            problems.extend(_blamed(message, path, BETWEEN.get(name, ())) for message in error.messages)
        except Exception as error:
            failed.add(name)
            part = getattr(getattr(config, str(path[0])), str(path[-1]), None)
            blame = f"'{part.use}' " if isinstance(part, Part) else ""
            problems.append(Problem(path, f"{blame}cannot be built: {type(error).__name__}: {error}"))
    if not failed & {"pyramid", "levels_per_block"}:
        try:
            assembly.build_model(device="meta")
        except HpdmError as error:
            problems.extend(_blamed(message, ("model",), BETWEEN["network"]) for message in error.messages)
        except Exception:
            pass  # a part that cannot be built on the meta device may still be valid
    return problems


def _blamed(message: str, path: KeyPath, between: tuple[KeyPath, ...]) -> Problem:
    """Return a problem at the key that ``message`` names, or else at ``path``."""
    named = KEY_FIRST.match(message)
    if named is not None and (steps := tuple(named[1].split(".")))[0] in CellConfig.model_fields:
        path, message = steps, message[named.end() :]
    return Problem(path, message, between)
