"""Read a complete study file: its arms or factors, seeds and backend, with each arm validated as a cell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpdm_core.assembly.compose import compose, dotted_overrides
from hpdm_core.assembly.validate import validate_cell
from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.base.passwords import without_password
from hpdm_core.config.overrides import Layers, Override, parse_arm, split_dotted
from hpdm_core.config.problems import KeyPath, dotted
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.config.search import SearchKeys
from hpdm_core.config.study_keys import RESERVED, SECTIONS, Budget, StudyKeys, check_top_level, is_reserved
from hpdm_core.plugins import Plugins
from hpdm_core.study.plan.space import check_search, vary

__all__ = ["StudyConfig", "load_study"]

ARM_NAME = re.compile(r"[A-Za-z0-9][^,:\s]*", re.ASCII)
ARM_RULE = "should begin with a letter or digit and hold no spaces, commas or colons"


def _nothing_to_vary(arm: str, values: Mapping[str, Any]) -> CellConfig:
    raise InputError(f"arm '{arm}': the study has no search")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A validated study. ``configs`` holds each arm's cell; `hpdm_core.study.plan.cells` adds the seeds."""

    name: str
    file: Path
    plugins: Plugins
    arms: dict[str, dict[str, Any]]
    """Arm -> dotted key -> value, in order."""
    configs: dict[str, CellConfig]
    baseline: str
    factors: dict[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    backend: Part
    budget: Budget
    storage: str | None
    selected: tuple[str, ...]
    """The arms selected by ``--only``, in order; all arms without it."""
    resolved: dict[str, Any]
    """The file after presets and ``--set``, as plain data, without passwords."""
    search: SearchKeys | None = None
    vary: Callable[[str, Mapping[str, Any]], CellConfig] = _nothing_to_vary
    """Return an arm's cell with the given dotted keys changed; raises InputError."""


def load_study(
    path: str | Path,
    *,
    sets: Sequence[str] = (),
    arms: Sequence[str] = (),
    only: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> StudyConfig:
    """Read and check a study file and the flags that change it.

    ``sets`` as in ``--set``, ``arms`` as in ``--arm``, ``only`` as in ``--only`` (names, or several with
    commas). Raises InputError with every problem, each on a line of its own with its place; writes nothing.
    """
    composed = compose(path, sets=sets, plugins=plugins, allow_preset=False)
    layers = composed.layers
    keys, problems = check_top_level(layers, backends=composed.plugins.models("backends"))
    if keys is None:
        # Check the sections nevertheless, so that every problem of the file is shown at once.
        raise InputError(*problems, *validate_cell(layers, composed.plugins)[1])
    sources = _arms(keys, layers, arms, problems)
    configs: dict[str, CellConfig] = {}
    for name, overrides in sources.items():
        config, lines = _validated_arm(layers, name, overrides, composed.plugins)
        if config is not None:
            configs[name] = config
        problems += [line for line in lines if line not in problems]
    if not problems:
        problems += _same(configs, layers, sources)
    if not problems:
        problems += _starts(configs, layers, sources)
    if not problems and keys.search is not None:
        problems += check_search(keys.search, layers, sources, configs, composed.plugins)
    baseline = keys.baseline if keys.baseline is not None else next(iter(sources), "default")
    if baseline not in sources:
        nearest = did_you_mean(baseline, sources) or f"; arms: {', '.join(sources)}"
        problems.append(f"{layers.where(('baseline',))}: baseline: no arm '{baseline}'{nearest}")
    selected = _selected(only, sources, problems)
    assert composed.file is not None, "a study comes from a file"
    name = keys.name or re.sub(r"[^\w.-]", "_", composed.file.stem, flags=re.ASCII)
    if keys.name is None and is_reserved(name):
        problems.append(f"{path}: name: {RESERVED} for the file, or give one in it")
    if problems:
        raise InputError(*problems)
    return StudyConfig(
        name=name,
        file=composed.file,
        plugins=composed.plugins,
        arms={arm: {dotted(each.path): each.value for each in given} for arm, given in sources.items()},
        configs=configs,
        baseline=baseline,
        factors=keys.factors,
        seeds=keys.seeds,
        backend=keys.backend,
        budget=keys.budget,
        storage=keys.storage,
        selected=selected,
        resolved=_shown({**layers.data, "name": name, "plugins": list(composed.plugins.names)}),
        search=keys.search,
        vary=lambda arm, values: vary(layers, arm, sources[arm], values, composed.plugins),
    )


def _shown(data: dict[str, Any]) -> dict[str, Any]:
    """Return the file's data with no password in it."""
    url = data.get("storage")
    return {**data, "storage": without_password(url)} if isinstance(url, str) else data


def _arms(
    keys: StudyKeys, layers: Layers, flags: Sequence[str], problems: list[str]
) -> dict[str, list[Override]]:
    """Return arm -> overrides from ``arms``, ``factors`` and ``--arm``."""
    if keys.factors and (keys.arms or flags):
        problems.append(
            f"{layers.where(('factors',))}: factors: a study has arms or factors, not both"
            + ("" if keys.arms else f" (--arm {flags[0]})")
        )
    sources: dict[str, list[Override]] = {}
    for name, overrides in keys.arms.items():
        place = layers.where(("arms", name))
        if not ARM_NAME.fullmatch(name):
            problems.append(f"{place}: arms: '{name}' {ARM_RULE}")
        try:
            sources[name] = dotted_overrides(overrides or {}, ("arms", name), layers.where)
        except InputError as error:
            problems.extend(error.messages)
            sources[name] = []
    if keys.factors:
        sources.update(_grid(keys.factors, layers, problems))
    elif not keys.arms:
        sources["default"] = []
    for flag in flags:
        name, given = parse_arm(flag)
        if name in sources:
            problems.append(f"--arm {flag}: the study has an arm '{name}' already; choose another name")
        elif not ARM_NAME.fullmatch(name):
            problems.append(f"--arm {flag}: '{name}' {ARM_RULE}")
        else:
            sources[name] = given
            layers.origins[("arms", name)] = f"--arm {flag}"
    return sources


def _grid(
    factors: Mapping[str, Sequence[Any]], layers: Layers, problems: list[str]
) -> dict[str, list[Override]]:
    """Return every combination of the factors' values, the last factor varying fastest."""
    paths: dict[str, KeyPath] = {}
    for key in factors:
        try:
            paths[key] = split_dotted(key, layers.where(("factors", key)))
        except InputError as error:
            problems.extend(error.messages)
            return {}
    last = [str(path[-1]) for path in paths.values()]
    short = {key: key if last.count(str(path[-1])) > 1 else str(path[-1]) for key, path in paths.items()}
    made: dict[str, list[Override]] = {}
    for combination in itertools.product(*(enumerate(values) for values in factors.values())):
        overrides, words = [], []
        for key, (index, value) in zip(paths, combination, strict=True):
            place = layers.where(("factors", key, index))
            overrides.append(Override(paths[key], value, _always(place)))
            text = value if isinstance(value, str) else canonical_json(value)
            words.append(f"{short[key]}=" + re.sub(r"[,:\s]+", "_", text))
        name = "+".join(words)
        if name in made:
            problems.append(f"{layers.where(('factors',))}: factors: two values give the arm '{name}'")
        made[name] = overrides
    return made


def _always(place: str) -> Callable[[KeyPath], str]:
    return lambda path: place


def _validated_arm(
    base: Layers, name: str, overrides: Sequence[Override], plugins: Plugins
) -> tuple[CellConfig | None, list[str]]:
    layers = base.copy()
    problems = []
    for override in overrides:
        top = str(override.path[0])
        if top not in SECTIONS:
            nearest = did_you_mean(top, SECTIONS) or f"; an arm may set: {', '.join(SECTIONS)}"
            place = override.where(override.path)
            problems.append(f"{place}: {dotted(override.path)}: not a key of arm '{name}'{nearest}")
        else:
            layers.apply(override)
    config, lines = validate_cell(layers, plugins)
    return config, problems + lines


def _same(
    configs: Mapping[str, CellConfig], layers: Layers, sources: Mapping[str, Sequence[Override]]
) -> list[str]:
    """Return a line for each arm that differs from an earlier one in ``runtime`` at most."""
    first: dict[str, str] = {}
    problems = []
    for name, config in configs.items():
        text = canonical_json(config.model_dump(mode="json", exclude={"runtime"}))
        if text in first:
            given = sources[name]
            place = given[0].where(given[0].path) if given else layers.where(("arms", name))
            problems.append(
                f"{place}: arms '{first[text]}' and '{name}' have the same configuration; change or drop one"
            )
        first.setdefault(text, name)
    return problems


def _starts(
    configs: Mapping[str, CellConfig], layers: Layers, sources: Mapping[str, Sequence[Override]]
) -> list[str]:
    """Return a line for each arm that starts from an unknown arm, or whose chain of start arms is a cycle."""
    key: KeyPath = ("training", "start_from", "arm")
    started = {arm: config.training.start_from for arm, config in configs.items()}
    after = {arm: start.arm for arm, start in started.items() if start is not None and start.arm is not None}
    problems = []
    for arm, base in after.items():
        given = [each for each in sources[arm] if each.path[: len(each.path)] == key[: len(each.path)]]
        place = given[-1].where(given[-1].path) if given else layers.where(key)
        chain = [arm]
        while chain[-1] in after and after[chain[-1]] not in chain:
            chain.append(after[chain[-1]])
        if base not in configs:
            nearest = did_you_mean(base, configs) or f"; arms: {', '.join(configs)}"
            problems.append(f"{place}: training.start_from.arm: no arm '{base}'{nearest}")
        elif chain[-1] in after:
            ring = " -> ".join([*chain, after[chain[-1]]])
            problems.append(
                f"{place}: training.start_from.arm: arm '{arm}' would have to be trained before itself ({ring}); "
                "allowed is an arm that starts from none of these"
            )
    return problems


def _selected(only: Sequence[str], arms: Collection[str], problems: list[str]) -> tuple[str, ...]:
    wanted = [name.strip() for item in only for name in item.split(",") if name.strip()]
    if only and not wanted:
        problems.append(f"--only {' '.join(only)}: names no arm; arms: {', '.join(arms)}")
    for name in wanted:
        if name not in arms:
            nearest = did_you_mean(name, arms) or f"; arms: {', '.join(arms)}"
            problems.append(f"--only {name}: no such arm{nearest}")
    return tuple(name for name in arms if not only or name in wanted)
