"""Problems in a user's data: where, and in one line what; every problem of a document at once.

pydantic's list of errors is turned into our own words: unknown keys come with the nearest valid name,
and wrong types with what was given.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpdm_core.base.errors import did_you_mean

__all__ = ["MISSING", "KeyPath", "Problem", "check", "dotted", "field_of", "in_json"]

KeyPath = tuple[str | int, ...]
MISSING = "missing, and it has no default"
AnyModel = TypeVar("AnyModel", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``path`` leads to it from the top of the document, ``message`` says what.

    Where it is between several values, ``between`` holds the others' paths: the one given last is to blame.
    """

    path: KeyPath
    message: str
    between: tuple[KeyPath, ...] = ()

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


def dotted(path: KeyPath) -> str:
    """Return ``a.b[0].c`` for ``("a", "b", 0, "c")``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def in_json(value: Any) -> str:
    """Return ``value`` as JSON; configuration models become what they look like in a file."""

    def other(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"a {type(item).__name__} cannot stand in a configuration")

    return json.dumps(value, default=other)


def check(model: type[AnyModel], data: Mapping[str, Any]) -> tuple[AnyModel | None, list[Problem]]:
    """Validate ``data`` (plain JSON types, tuples allowed for lists) as ``model``.

    Returns the model and no problems, or None and every problem. Types are strict, as they are in JSON: a
    list may stand for a tuple and an integer for a float, but neither ``"4"`` nor ``true`` for 4.
    """
    try:
        text = in_json(data)
    except TypeError as error:
        return None, [Problem((), str(error))]
    try:
        return model.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, _translate(model, data, error)


def _translate(model: type[BaseModel], data: Any, error: ValidationError) -> list[Problem]:
    found: dict[KeyPath, str] = {}
    misspelt: set[KeyPath] = set()
    for item in error.errors(include_url=False, include_context=True):
        location = tuple(item["loc"])
        path = _existing(data, location, keep_last=item["type"] == "missing")
        match item["type"]:
            case "extra_forbidden":
                allowed = _fields(model, path[:-1])
                nearest = did_you_mean(str(location[-1]), allowed)
                misspelt |= {(*path[:-1], name) for name in allowed if f"'{name}'" in nearest}
                message = f"unknown key{nearest or '; allowed: ' + ', '.join(allowed)}"
            case "missing":
                message = MISSING
            case "model_type" | "dict_type" | "model_attributes_type":
                message = f"should be a mapping of keys to values, got {_shown(item['input'])}"
            case "too_short":
                message = (
                    f"should have at least {item['ctx']['min_length']} items, got {_shown(item['input'])}"
                )
            case "value_error":
                message = str(item["ctx"]["error"])
                if path:  # else it is about the document as a whole
                    message += f", got {_shown(item['input'])}"
            case "literal_error":
                nearest = did_you_mean(str(item["input"]), _expected(item))
                message = f"{_lowered(item['msg'])}, got {_shown(item['input'])}{nearest}"
            case _:
                message = f"{_lowered(item['msg'])}, got {_shown(item['input'])}"
        if path in found and message not in found[path]:
            found[path] += f"; or {message}"
        else:
            found[path] = message
    # A list whose items are refused is called too short as well, and a key that is misspelt is called missing
    # under its right name: that says nothing new.
    inner = {path[:-1] for path in found}
    short = {tuple(item["loc"]) for item in error.errors() if item["type"] == "too_short"}
    silent = (inner & short) | {path for path in misspelt if found.get(path) == MISSING}
    return [Problem(path, message) for path, message in found.items() if path not in silent]


def _expected(item: Any) -> list[str]:
    return [word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _lowered(message: str) -> str:
    return message.removeprefix("Input ").rstrip(".")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) and value is not None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _existing(data: Any, location: Sequence[str | int], *, keep_last: bool) -> KeyPath:
    """Drop what pydantic adds to a path that is not in the document, such as the branch of a union."""
    path: list[str | int] = []
    for step in location:
        if isinstance(data, BaseModel):
            data = data.model_dump(mode="json")
        listed = isinstance(data, (list, tuple)) and isinstance(step, int) and step < len(data)
        if not listed and not (isinstance(data, Mapping) and step in data):
            continue
        data = data[step]
        path.append(step)
    if keep_last and (not path or path[-1] != location[-1]):
        path.append(location[-1])
    return tuple(path)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first model that an annotation mentions."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def field_of(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """Return the model that stands at ``path`` within ``model``, or None."""
    current: type[BaseModel] | None = model
    keyed = False  # the next step is a key of a mapping, chosen by the user
    for step in path:
        if isinstance(step, int):
            continue
        if keyed:
            keyed = False
            continue
        if current is None or step not in current.model_fields:
            return None
        annotation = current.model_fields[step].annotation
        current, keyed = _model_in(annotation), typing.get_origin(annotation) is dict
    return current


def _fields(model: type[BaseModel], path: KeyPath) -> list[str]:
    found = field_of(model, path)
    if found is None:
        return []
    return sorted(field.alias or name for name, field in found.model_fields.items())
