"""Check a search space against the arms of a study: every axis must be valid in every arm before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpdm_core.assembly.validate import validate_cell
from hpdm_core.base.errors import InputError
from hpdm_core.config.overrides import Layers, Override, lines_of, split_dotted
from hpdm_core.config.problems import KeyPath, Problem, dotted
from hpdm_core.config.schema import CellConfig
from hpdm_core.config.search import SearchKeys, search_problems
from hpdm_core.plugins import Plugins

__all__ = ["check_search", "vary"]

Arms = Mapping[str, Sequence[Override]]


def check_search(
    search: SearchKeys, layers: Layers, arms: Arms, configs: Mapping[str, CellConfig], plugins: Plugins
) -> list[str]:
    """Return a line for every problem of ``search``, each with its place in the study file.

    Each arm is validated with the ends of every axis and with every choice. ``configs``: the arms' configurations
    without the search.
    """
    metrics = {
        plugins.make("metrics", part).name for each in configs.values() for part in each.evaluation.metrics
    }
    found = search_problems(search, sorted(metrics))
    lines = lines_of([Problem(("search", *each.path), each.message, each.between) for each in found], layers)
    paths: dict[str, KeyPath] = {}
    for key in search.space:
        try:
            paths[key] = split_dotted(key, layers.where(("search", "space", key)))
        except InputError as error:
            lines += error.messages
    if lines:
        return lines
    for arm, overrides in arms.items():
        for key, path in paths.items():
            for given in overrides:
                if given.path[: len(path)] == path or path[: len(given.path)] == given.path:
                    lines.append(
                        f"{layers.where(('search', 'space', key))}: search: arm '{arm}' sets "
                        f"{dotted(given.path)} itself; allowed: keys that no arm sets"
                    )
    probes = [axis.probes for axis in search.space.values()]
    for number in range(max(map(len, probes)) if not lines else 0):
        values = {
            key: each[min(number, len(each) - 1)] for key, each in zip(search.space, probes, strict=True)
        }
        for arm, overrides in arms.items():
            try:
                vary(layers, arm, overrides, values, plugins)
            except InputError as error:
                lines += [line for line in error.messages if line not in lines]
    return lines


def vary(
    layers: Layers, arm: str, overrides: Sequence[Override], values: Mapping[str, Any], plugins: Plugins
) -> CellConfig:
    """Return the configuration of ``arm``: its own ``overrides``, then the dotted keys of ``values``.

    Raises InputError when the values do not fit together.
    """
    varied = layers.copy()
    for override in overrides:
        varied.apply(override)
    for key, value in values.items():
        place = layers.where(("search", "space", key))
        varied.apply(Override(split_dotted(key, place), value, _always(place)))
    config, lines = validate_cell(varied, plugins)
    if config is None or lines:
        raise InputError(*(lines or [f"arm '{arm}': no valid configuration"]))
    return config


def _always(place: str) -> Callable[[KeyPath], str]:
    return lambda path: place
