"""Layers of configuration merged into one, each value remembering where it was given.

Mappings merge key by key, lists and values replace. A part is a mapping with ``use``: naming another part
drops the options of the old one. Overrides come as ``a.b.c=value`` from flags, or as dotted keys of an arm.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from hpdm_core.base.errors import InputError
from hpdm_core.config.loader import parse_value
from hpdm_core.config.problems import KeyPath, Problem
from hpdm_core.config.schema import CellConfig, Part

__all__ = ["Layers", "Override", "lines_of", "parse_arm", "parse_set", "part_paths", "split_dotted"]


@functools.cache
def part_paths() -> frozenset[KeyPath]:
    """Return the paths at which a single part stands; ``NAME`` there means ``{use: NAME}``."""
    found: set[KeyPath] = {("backend",), ("search", "sampler"), ("search", "pruner")}
    for section, outer in CellConfig.model_fields.items():
        for name, inner in getattr(outer.annotation, "model_fields", {}).items():
            if inner.annotation is Part:
                found.add((section, name))
    return frozenset(found)


@dataclass(frozen=True)
class Override:
    """One value for one dotted path; ``where`` tells, for a path below it or itself, where it was given."""

    path: KeyPath
    value: Any
    where: Callable[[KeyPath], str]


@dataclass
class Layers:
    """What has been merged so far, and the origin of every key."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    name: str = "configuration"
    """Named where no origin is known."""
    ages: dict[KeyPath, int] = field(default_factory=dict)
    """Number of the layer that each key came with, or was changed below by."""
    layers: int = 0

    def copy(self) -> Self:
        """Return a copy that can be merged into on its own."""
        return type(self)(
            copy.deepcopy(self.data), dict(self.origins), self.name, dict(self.ages), self.layers
        )

    def where(self, path: KeyPath) -> str:
        """Return where the value at ``path``, or the nearest one above it, was given."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path] if path else self.name

    def to_blame(self, path: KeyPath, others: Sequence[KeyPath]) -> KeyPath:
        """Return which of ``path`` and ``others``, or of what is above them in a section, was laid on last.

        Of those that were laid on together it is ``path``, then the first of ``others``.
        """
        given = []
        for each in (path, *others):
            while len(each) > 1 and each not in self.ages:
                each = each[:-1]
            if len(each) > 1:
                given.append(each)
        return max(given, key=self.ages.__getitem__, default=path)

    def merge(self, data: Mapping[str, Any], where: Callable[[KeyPath], str]) -> None:
        """Lay ``data`` over what is there."""
        self.layers += 1
        self._merge(self.data, data, (), where)

    def apply(self, override: Override) -> None:
        """Lay one override over what is there."""
        nested: Any = override.value
        for step in reversed(override.path):
            nested = {step: nested}
        depth = len(override.path)
        self.merge(nested, lambda path: override.where(path if len(path) > depth else override.path))

    def _merge(
        self, base: dict[str, Any], over: Mapping[str, Any], at: KeyPath, where: Callable[[KeyPath], str]
    ) -> None:
        for key, value in over.items():
            path = (*at, key)
            old = base.get(key)
            if path in part_paths():
                old = {"use": old} if isinstance(old, str) else old
                value = {"use": value} if isinstance(value, str) else value
            if isinstance(old, dict) and isinstance(value, Mapping) and not _another_part(old, value):
                base[key] = old
                self._set_origin(path, where)
                self._merge(old, value, path, where)
                continue
            for stale in [known for known in self.origins if known[: len(path)] == path]:
                del self.origins[stale]
                self.ages.pop(stale, None)
            base[key] = copy.deepcopy(value)
            self._note(value, path, where)

    def _set_origin(self, path: KeyPath, where: Callable[[KeyPath], str]) -> None:
        self.origins[path] = where(path)
        self.ages[path] = self.layers

    def _note(self, value: Any, path: KeyPath, where: Callable[[KeyPath], str]) -> None:
        self._set_origin(path, where)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._note(item, (*path, key), where)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._note(item, (*path, index), where)


def _another_part(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "use" in new and "use" in old and new["use"] != old["use"]


def split_dotted(key: str, origin: str) -> KeyPath:
    """Return ``("a", "b")`` for ``a.b``; InputError for an empty step."""
    steps = tuple(step.strip() for step in key.split("."))
    if not all(steps):
        raise InputError(f"{origin}: '{key}' is not a path such as training.steps")
    return steps


def parse_set(text: str, *, flag: str = "--set") -> Override:
    """Read ``a.b.c=value``; the value is YAML."""
    origin = f"{flag} {text}"
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{origin}: should be KEY=VALUE, for example {flag} training.steps=100")
    return Override(split_dotted(key, origin), parse_value(value, origin), lambda path: origin)


def parse_arm(text: str) -> tuple[str, list[Override]]:
    """Read ``NAME:key=value,key=value``; commas within brackets or quotes belong to the value."""
    origin = f"--arm {text}"
    name, _, rest = text.partition(":")
    if not name.strip():
        raise InputError(f"{origin}: should be NAME:KEY=VALUE,..., for example --arm mine:training.steps=100")
    overrides = []
    for item in _split_commas(rest):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"{origin}: '{item}' should be KEY=VALUE")
        overrides.append(Override(split_dotted(key, origin), parse_value(value, origin), lambda path: origin))
    return name.strip(), overrides


def _split_commas(text: str) -> Sequence[str]:
    items, depth, quote, start = [], 0, "", 0
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append(text[start:index])
            start = index + 1
    items.append(text[start:])
    return [item.strip() for item in items if not re.fullmatch(r"\s*", item)]


def lines_of(problems: list[Problem], layers: Layers) -> list[str]:
    """Return problems as lines: where it was given, the key, what is wrong."""
    lines = []
    for problem in problems:
        blamed = layers.to_blame(problem.path, problem.between) if problem.between else problem.path
        lines.append(f"{layers.where(blamed)}: {problem}")
    return lines
