"""YAML as people expect it: ``1e-4`` is a number, ``on`` and ``1:30`` are text, a key twice is an error.

PyYAML composes the nodes; scalars are read by the core schema of YAML 1.2 and every key keeps its line.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.problems import KeyPath, dotted

__all__ = ["Document", "load_yaml", "parse_value"]

TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {f"{TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


@dataclass(frozen=True)
class Document:
    """The content of a file, and where each of its keys stands."""

    data: dict[str, Any]
    file: str
    """The path as it was given."""
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return ``file:line`` of a key, or of the nearest key above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines[path]}" if path else self.file


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2's core schema and none of 1.1's."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name for it; add_implicit_resolver fills it


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    # PyYAML matches from the start only; the first pattern that fits wins, so int stands before float.
    _Loader.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"(?:{_pattern})$"), _first)


class _Reader:
    """Turns the nodes of one text into plain data, noting lines and gathering problems."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._open: set[int] = set()

    def problem(self, node: yaml.Node, message: str) -> None:
        self.problems.append(f"{self.file}:{node.start_mark.line + 1}: {message}")

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.tag not in PLAIN_TAGS:
            self.problem(node, f"the tag '{node.tag}' is not allowed; a file holds plain values only")
            return None
        if id(node) in self._open:
            self.problem(node, "an alias that contains itself")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        try:
            return self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        finally:
            self._open.discard(id(node))

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = item.start_mark.line + 1
            items.append(self.read(item, (*path, index)))
        return items

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key: Hashable = self.read(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self.problem(key_node, f"the key '{getattr(key_node, 'value', '')}' should be text; quote it")
                continue
            place = (*path, key)
            if key in found:
                first = self.lines[place]
                self.problem(key_node, f"duplicate key '{dotted(place)}', first given in line {first}")
                continue
            self.lines[place] = key_node.start_mark.line + 1
            found[key] = self.read(value_node, place)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        try:
            match node.tag.removeprefix(TAG):
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                case "float":
                    return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        except (KeyError, ValueError):
            self.problem(node, f"'{text}' is not a {node.tag.removeprefix(TAG)}")
        return text


def _compose(text: str, file: str) -> tuple[Any, _Reader]:
    reader = _Reader(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = reader.read(node, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        context = f" ({error.context})" if error.context else ""
        raise InputError(f"{file}{line}: not valid YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{file}: not valid YAML: nested too deeply") from None
    if reader.problems:
        raise InputError(*reader.problems)
    return data, reader


def load_yaml(path: str | Path) -> Document:
    """Read a file whose top level is a mapping.

    Raises InputError, one line per problem: no such file, not readable, not UTF-8, empty, no mapping, a
    syntax error, a duplicate key, a key that is not text, a tag.
    """
    file = str(path)
    place = Path(path).expanduser()
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [each.name for each in place.parent.glob("*.y*ml")] if place.parent.is_dir() else []
        raise InputError(f"{file}: no such file{did_you_mean(place.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    data, reader = _compose(text, file)
    if data is None:
        raise InputError(f"{file}: empty; a study file is a mapping of keys such as 'extends: PRESET'")
    if not isinstance(data, dict):
        raise InputError(f"{file}: should be a mapping of keys to values, got a {type(data).__name__}")
    return Document(data, file, reader.lines)


def parse_value(text: str, origin: str) -> Any:
    """Read one value as it would stand in a file; ``origin``, such as ``--set a=[1``, is named in errors."""
    try:
        return _compose(text, origin)[0]
    except InputError as error:
        raise InputError(
            *(message.replace(f"{origin}:1:", f"{origin}:") for message in error.messages)
        ) from None
