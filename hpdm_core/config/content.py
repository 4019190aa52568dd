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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

__all__ = [
    "Content",
    "Known",
    "fingerprint_files",
    "fingerprint_tree",
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
