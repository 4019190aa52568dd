"""Options that say where something lies: keys take what lies there, never where.

    def my_dataset(clip, reader, *, root: Annotated[Path, Content()]): ...

In the keys `root` is replaced by a fingerprint of what lies there. So a folder may be moved, or lie elsewhere
on another machine, and nothing is computed again; what is added, removed or changed in it makes its cells new.
Works for the options of every part, and of parts among options.
"""

from __future__ import annotations

import hashlib
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any
from weakref import WeakKeyDictionary

from pydantic import BaseModel

from hpdm_core.config.problems import check
from hpdm_core.config.schema import Part, neutral_fields

if typing.TYPE_CHECKING:
    from hpdm_core.plugins import Plugins

__all__ = [
    "Content",
    "Known",
    "absent_of",
    "contents_of",
    "fingerprint_at",
    "fingerprint_files",
    "fingerprint_tree",
    "keyed_part",
    "marked",
    "mentions_path",
    "place_of",
]

Known = Callable[[str], str | None]
"""``known(place)``: the fingerprint of what lay at ``place`` (`place_of`) when it was there; None for unknown."""

WHOLE_BYTES = 2**28
"""Files of at most this many bytes together are hashed whole, more by their sizes and their ends."""

END_BYTES = 2**16
THREADS = 8  # waiting for a network's file system, rather than computing


def fingerprint_files(files: Iterable[tuple[str, Path]]) -> str:
    """Return the SHA-256 of ``files``, pairs of a name and where it lies: of the names, sizes and contents.

    All contents where the files have `WHOLE_BYTES` or less together; else the first and last 64 KiB of each,
    as reading a large data set takes as long as training on it. A file that cannot be read counts as such.
    The order does not matter.
    """
    listed = sorted(files)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(lambda file: _size(file[1]), listed))
        whole = sum(size or 0 for size in sizes) <= WHOLE_BYTES
        digests = list(pool.map(lambda file: _digest(file[1], whole=whole), listed))
    made = hashlib.sha256(b"whole" if whole else b"ends")
    for (name, _), size, digest in zip(listed, sizes, digests, strict=True):
        made.update(f"\n{name!r} {size} {digest}".encode())
    return made.hexdigest()


def fingerprint_tree(place: Path) -> str:
    """Return the SHA-256 of a file's content, or of a folder's: all files below it, by their paths relative to
    it; hidden ones are left out.
    """
    if place.is_file():
        return fingerprint_files([("", place)])
    found = []
    for folder, folders, names in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(folder)
        found += [
            ((here / name).relative_to(place).as_posix(), here / name)
            for name in names
            if not name.startswith(".")
        ]
    return fingerprint_files(found)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _digest(path: Path, *, whole: bool) -> str:
    try:
        with path.open("rb") as stream:
            if whole:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.seek(0, 2)
            stream.seek(0)
            made = hashlib.sha256(stream.read(END_BYTES))
            stream.seek(max(size - END_BYTES, min(size, END_BYTES)))
            made.update(stream.read(END_BYTES))
            return made.hexdigest()
    except OSError:
        return "unreadable"


@dataclass(frozen=True)
class Content:
    """The mark of an option that is a path: ``Annotated[Path, Content()]``, also within a tuple or a union.

    ``fingerprint(path)`` returns a text that is equal for equal content, wherever it lies. It is called for a
    path that exists, once per run, and raises nothing. Give one of your own, such as `fingerprint_files` of
    those files that matter, where not all of a folder does.
    """

    fingerprint: Callable[[Path], str] = fingerprint_tree


def place_of(path: Path) -> str:
    """Return the absolute path that a place is known by."""
    return str(path.expanduser().absolute())


_SEEN: WeakKeyDictionary[Any, dict[tuple[Content, str], str]] = WeakKeyDictionary()


def _fingerprint(plugins: Plugins, mark: Content, path: Path, known: Known | None) -> str | None:
    """Return the fingerprint of what lies, or lay, at ``path``; None where nothing lies and none is known."""
    place = place_of(path)
    if not Path(place).exists():
        return known(place) if known is not None else None
    seen = _SEEN.setdefault(plugins, {})  # one run sees one state of the data, and reads it once
    if (mark, place) not in seen:
        seen[mark, place] = mark.fingerprint(Path(place))
    return seen[mark, place]


def fingerprint_at(plugins: Plugins, path: Path, known: Known | None = None) -> str | None:
    """Return the fingerprint of what lies, or as far as ``known`` lay, at ``path``; None where that is nothing.

    ``plugins`` stand for the run: within one, each place is read once.
    """
    return _fingerprint(plugins, Content(), path, known)


def marked(model: type[BaseModel]) -> dict[str, Content]:
    """Return option -> its mark, of those options of a part that have one."""
    hints = typing.get_type_hints(model, include_extras=True)
    found = {}
    for name in model.model_fields:
        marks = [mark for mark in _marks(hints[name]) if isinstance(mark, Content)]
        if marks:
            found[name] = marks[0]
    return found


def mentions_path(model: type[BaseModel]) -> set[str]:
    """Return the options of a part that are paths, or hold some."""
    hints = typing.get_type_hints(model, include_extras=True)
    return {name for name in model.model_fields if _mentions_path(hints[name])}


def _mentions_path(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return True
    return any(_mentions_path(inner) for inner in typing.get_args(annotation))


def _marks(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for inner in typing.get_args(annotation):
        yield from _marks(inner)


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
    """Return place -> fingerprint of all that the marked options of ``part``, and of parts in it, point at;
    places where nothing lies, and of which nothing is known, are left out.
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
    """Return (part, option, path) of each path of a marked option at which nothing lies, nor is known to have
    lain.
    """
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
    """Return a valid ``part`` as JSON for a key: each path of a marked option replaced by its fingerprint, and
    options marked `hpdm_core.config.schema.Later` left out at their default.

    A path at which nothing lies is replaced by what ``known`` says lay there, else kept as it is given.
    """
    from hpdm_core.plugins.options import parts_of

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
