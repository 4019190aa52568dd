"""Fingerprints of the files at the paths in parts' options. Keys contain the fingerprint instead of the path.

"Marked" options are paths annotated with `hpdm_core.config.content.Content`. ``known`` returns the recorded
fingerprint of a path that no longer exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hpdm_core.config.content import Content, Known, marked, place_of
from hpdm_core.config.problems import check
from hpdm_core.config.schema import Part, neutral_fields
from hpdm_core.plugins import Plugins
from hpdm_core.plugins.options import parts_of

__all__ = ["absent_of", "contents_of", "fingerprint_at", "keyed_part"]

_SEEN: WeakKeyDictionary[Any, dict[tuple[Content, str], str]] = WeakKeyDictionary()


def _fingerprint(plugins: Plugins, mark: Content, path: Path, known: Known | None) -> str | None:
    """Return the fingerprint of the content at ``path``, or the recorded one if it no longer exists; else None."""
    place = place_of(path)
    if not Path(place).exists():
        return known(place) if known is not None else None
    seen = _SEEN.setdefault(plugins, {})  # each path is read once per run
    if (mark, place) not in seen:
        seen[mark, place] = mark.fingerprint(Path(place))
    return seen[mark, place]


def fingerprint_at(plugins: Plugins, path: Path, known: Known | None = None) -> str | None:
    """Return the fingerprint of the content at ``path``, or that of ``known`` if ``path`` no longer exists; else None.

    ``plugins`` identify the run: each path is read once per ``plugins`` object.
    """
    return _fingerprint(plugins, Content(), path, known)


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)


def contents_of(plugins: Plugins, family: str, part: Part, known: Known | None = None) -> dict[str, str]:
    """Return place -> fingerprint for the marked options of ``part`` and of the parts in its options.

    Places that do not exist and have no recorded fingerprint are left out.
    """
    found: dict[str, str] = {}
    for inner, each in plugins.nested(family, part):
        model = plugins.options(inner, each.use)
        made, _ = check(model, each.options)
        for name, mark in marked(model).items() if made is not None else ():
            for path in _paths(getattr(made, name)):
                fingerprint = _fingerprint(plugins, mark, path, known)
                if fingerprint is not None:
                    found[place_of(path)] = fingerprint
    return found


def absent_of(
    plugins: Plugins, family: str, part: Part, known: Known | None = None
) -> list[tuple[str, str, Path]]:
    """Return (part, option, path) for each path in a marked option that does not exist and has no known fingerprint."""
    found = []
    for inner, each in plugins.nested(family, part):
        model = plugins.options(inner, each.use)
        made, _ = check(model, each.options)
        for name, mark in marked(model).items() if made is not None else ():
            found += [
                (each.use, name, path)
                for path in _paths(getattr(made, name))
                if _fingerprint(plugins, mark, path, known) is None
            ]
    return found


def keyed_part(plugins: Plugins, family: str, part: Part, known: Known | None = None) -> dict[str, Any]:
    """Return a valid ``part`` as JSON for a key.

    Each path in a marked option is replaced by its fingerprint. Options marked `hpdm_core.config.schema.Later` are
    left out if they have their default. A path that does not exist is replaced by its recorded fingerprint from
    ``known``; if there is none, the path itself stays in the key.
    """
    model = plugins.options(family, part.use)
    made, problems = check(model, part.options)
    if made is None:
        raise ValueError(f"{family}/{part.use}: not validated: {'; '.join(map(str, problems))}")
    data: dict[str, Any] = part.model_dump(mode="json")
    for name in neutral_fields(made):
        data.pop(name, None)
    for name, mark in marked(model).items():
        data[name] = _replaced(getattr(made, name), partial(_keyed, plugins, mark, known))
    for name, (inner, value) in parts_of(model, made).items():
        if isinstance(value, Part):
            data[name] = keyed_part(plugins, inner, value, known)
        elif isinstance(value, list | tuple):
            data[name] = [
                keyed_part(plugins, inner, item, known) if isinstance(item, Part) else item for item in value
            ]
    return data


def _keyed(plugins: Plugins, mark: Content, known: Known | None, path: Path) -> dict[str, str]:
    fingerprint = _fingerprint(plugins, mark, path, known)
    return {"nothing at": str(path)} if fingerprint is None else {"content": fingerprint}


def _replaced(value: Any, of: Callable[[Path], Any]) -> Any:
    if isinstance(value, Path):
        return of(value)
    if isinstance(value, list | tuple):
        return [_replaced(item, of) for item in value]
    if isinstance(value, Mapping):
        return {key: _replaced(item, of) for key, item in value.items()}
    return value
