"""What each key of a study file means: ``--explain KEY``, and the tables of docs/study-file.md.

Keys, types and defaults come from the models of `hpdm_core.config` and from the options of the registered parts. The
meaning of a field is the text below it in the source. The meaning of a part is the first paragraph of its factory's
docstring, and that of its option the entry under ``Args:`` there.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.loader import parse_value
from hpdm_core.config.problems import field_of
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.config.search import PRUNERS, SAMPLERS
from hpdm_core.config.study_keys import SECTIONS, StudyKeys
from hpdm_core.plugins import FAMILIES, Plugins

__all__ = ["Key", "PartEntry", "Place", "explain", "keys", "keys_of", "meanings", "places", "reference"]

WIDTH = 100
REQUIRED = "required"
NAMES = {type(None): "null", Any: "any value", Part: "part", Path: "path"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a study file, or an option of a part; everything is text as it would stand in a file."""

    path: str
    """Dotted; ``*`` stands for a name that the user chooses, or for an item of a list."""
    type: str
    default: str
    """``required`` where there is none."""
    meaning: str
    """One line; empty where the source says nothing."""

    @property
    def name(self) -> str:
        """The last step of the path."""
        return self.path.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """Type and default."""
        return f"{self.type}, {self.default if self.default == REQUIRED else f'default {self.default}'}"


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A part that a key may name, and its options."""

    name: str
    meaning: str
    options: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A key that holds a part, or a list of parts, of one family."""

    path: str
    family: str
    parts: tuple[PartEntry, ...]


FROM_THE_LOADER = (
    Key(
        path="extends",
        type="str or null",
        default="null",
        meaning="A preset's name, or the path of another study file, whose keys this file starts from.",
    ),
    Key(
        path="plugins",
        type="list of str",
        default="[]",
        meaning="Plugins of the study: paths of Python files, relative to this file, or names of modules.",
    ),
)
"""Keys that are read before the models: no field stands for them."""


def keys() -> list[Key]:
    """Return every key of a study file in the order of the reference, options of parts aside."""
    sections = (key for key in keys_of(CellConfig) if key.path.partition(".")[0] in SECTIONS)
    return [*FROM_THE_LOADER, *keys_of(StudyKeys), *sections]


def places(plugins: Plugins) -> list[Place]:
    """Return every key that holds parts, with the parts that there are, in the order of the keys."""
    found = [
        Place(
            path=family.path,
            family=family.name,
            parts=tuple(_registered(plugins, family.name, name) for name in plugins.keys(family.name)),
        )
        for family in FAMILIES.values()
    ]
    for name, models in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        path = f"search.{name}"
        parts = (
            PartEntry(name=key, meaning=_paragraph(model), options=tuple(keys_of(model, f"{path}.")))
            for key, model in models.items()
        )
        found.append(Place(path=path, family=f"{name}s", parts=tuple(parts)))
    order = [key.path for key in keys()]
    return sorted(found, key=lambda place: (order.index(place.path.partition(".*")[0]), len(place.path)))


def explain(plugins: Plugins, key: str) -> str:
    """Return what ``key`` means, as text for a terminal.

    ``key`` is a dotted key, a key that others begin with (``model``), an option of a part
    (``model.backbone.heads``), or a part: ``FAMILY/PART``. Raises InputError with the nearest key.
    """
    held = {_plain(place.path): place for place in places(plugins)}
    family, _, name = key.strip().replace(" ", "/").partition("/")
    if name:
        return "\n".join(_about_part(held.values(), family, name))
    path = _plain(re.sub(r"\[\d*\]", "", key.strip())).removesuffix(".use")
    known = {_plain(each.path): each for each in keys()}
    options: dict[str, list[tuple[PartEntry, Key]]] = {}
    for place in held.values():
        for part in place.parts:
            for option in part.options:
                options.setdefault(_plain(option.path), []).append((part, option))
    lines: list[str] = []
    if path in known:
        lines += _about_key(known[path], [each for each in known if each.startswith(f"{path}.")], known)
    if path in options:
        lines += _about_option(options[path])
    if path in held:
        lines += _about_place(held[path])
    if not lines:
        raise InputError(f"--explain {key}: no key of a study file{_nearest(path, [*known, *options])}")
    return "\n".join(lines)


def reference(plugins: Plugins) -> str:
    """Return all keys as Markdown: a table of the top level, then one per section and per key that holds parts."""
    everything = keys()
    below: dict[str, list[Key]] = {}
    held: dict[str, list[Place]] = {}
    for key in everything:
        if "." in key.path:
            below.setdefault(key.path.partition(".")[0], []).append(key)
    for place in places(plugins):
        held.setdefault(place.path.partition(".")[0], []).append(place)
    top_level = [key for key in everything if "." not in key.path]
    sections = below.keys() | held.keys()
    lines = ["### Top level", "", *_table(top_level, sections)]
    for top in top_level:
        if top.path in sections:
            lines += ["", f"### {top.path}", "", _markdown(top.meaning)]
        if top.path in below:
            lines += ["", *_table(below[top.path])]
        for place in held.get(top.path, ()):
            lines += ["", f"#### Parts of `{place.path}` (family `{place.family}`)", "", *_part_table(place)]
    return "\n".join(lines) + "\n"


@functools.cache
def meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """Return field -> the text below it in the source, of ``model`` and of the models that it derives from.

    pydantic's ``use_attribute_docstrings`` reads the same text, but whenever the models are imported: 0.15 s at
    the start of every command and worker.
    """
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if not issubclass(each, BaseModel) or each is BaseModel:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        except (OSError, TypeError):  # there is no source to read
            continue
        assert isinstance(tree, ast.ClassDef), "the source of a class"
        for field, below in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = _line(text.value)
    return found


# From models and signatures to keys


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the keys of ``model``, each followed by those below it; their paths begin with ``prefix``."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        default = (
            REQUIRED if field.is_required() else _value_text(field.get_default(call_default_factory=True))
        )
        yield Key(
            path=path,
            type=_type_text(field.annotation, field.metadata),
            default=default,
            meaning=meanings(model).get(name, ""),
        )
        inner = field_of(model, (name,))
        if inner is not None and inner is not Part:
            chosen = typing.get_origin(field.annotation) is dict
            yield from keys_of(inner, f"{path}.*." if chosen else f"{path}.")


def _registered(plugins: Plugins, family: str, name: str) -> PartEntry:
    """Return the part ``name`` of ``family`` as its plugin registered it."""
    registration = plugins.get(family, name)
    model = registration.options
    hints = typing.get_type_hints(model, include_extras=True)
    said = _option_meanings(registration.factory)
    options = [
        Key(
            path=f"{FAMILIES[family].path}.{option}",
            type=_type_text(hints[option]),
            default=REQUIRED if field.is_required() else _value_text(field.default),
            meaning=said.get(option, ""),
        )
        for option, field in model.model_fields.items()
    ]
    return PartEntry(name=name, meaning=_paragraph(registration.factory), options=tuple(options))


def _option_meanings(factory: Callable[..., Any]) -> dict[str, str]:
    """Return option -> what the factory's docstring says of it under ``Args:``.

    Of a factory marked by `hpdm_core.plugins.options.options_from`, the text below the fields of its model.
    """
    text = inspect.cleandoc(getattr(factory, "__doc__", None) or "").partition("\nArgs:\n")[2]
    words = _line(text.partition("\n\n")[0])
    arguments = list(inspect.signature(factory).parameters)
    pieces = re.split(rf"(?:^|\s)({'|'.join(arguments)}): ", words) if arguments else []
    found = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    model = getattr(factory, "options_model", None)
    if model is not None:
        found |= meanings(model)
    return found


def _paragraph(documented: Any) -> str:
    """Return the first paragraph of a docstring as one line."""
    return _line((getattr(documented, "__doc__", None) or "").strip().partition("\n\n")[0])


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _type_text(annotation: Any, marks: Sequence[Any] = ()) -> str:
    """Return what may stand in a file for an annotation, limits included."""
    *most, last = _alternatives(annotation, marks)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(annotation: Any, marks: Sequence[Any] = ()) -> Iterator[str]:
    """Yield the texts of a union's members and of a Literal's values; else one text."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _alternatives(inner[0], (*inner[1:], *marks))
    elif origin in (typing.Union, types.UnionType):
        for each in inner:
            yield from _alternatives(each)
    elif origin is Literal:
        yield from map(_value_text, inner)
    else:
        families = [mark for mark in marks if isinstance(mark, str)]
        whole = _plain_type(annotation, origin, inner) + "".join(f" of {each}" for each in families)
        limits = [limit for mark in marks for limit in _limits(mark)]
        yield f"{whole} {' and '.join(limits)}" if limits else whole


def _plain_type(annotation: Any, origin: Any, inner: Sequence[Any]) -> str:
    if origin in (list, tuple):
        items = [_type_text(each) for each in inner if each is not ...]
        if origin is tuple and ... not in inner:
            same = len(set(items)) == 1
            return f"list of {len(items)} {items[0]}" if same else f"[{', '.join(items)}]"
        return f"list of {items[0]}"
    if origin is dict:
        return f"mapping of {_type_text(inner[0])} to {_type_text(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel) and annotation is not Part:
        return "mapping"
    return NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _limits(mark: Any) -> Iterator[str]:
    for each in getattr(mark, "metadata", (mark,)):  # a Field holds several
        for name, sign in SIGNS.items():
            if getattr(each, name, None) is not None:
                yield f"{sign} {getattr(each, name):g}"
        if getattr(each, "min_length", None) is not None:
            yield f"(at least {each.min_length})"


def _value_text(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, Part):
        return value.use if not value.options else _value_text({"use": value.use, **value.options})
    if isinstance(value, BaseModel):
        return _value_text(value.model_dump(exclude_defaults=True))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _text_in_yaml(str(value)) if isinstance(value, str | Path) else str(value)


def _text_in_yaml(text: str) -> str:
    """Return ``text`` in quotes where YAML would read it as something else without them."""
    try:
        quoted = parse_value(text, text) != text
    except InputError:
        quoted = True
    return json.dumps(text) if quoted else text


# Keys as text for a terminal


def _plain(path: str) -> str:
    """Return a dotted key without the steps ``*``."""
    return ".".join(step for step in path.split(".") if step != "*")


def _wrapped(text: str, depth: int, *, hang: int = 0) -> str:
    begin = "  " * depth
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=begin,
        subsequent_indent=begin + "  " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _about_key(key: Key, below: Sequence[str], known: Mapping[str, Key]) -> list[str]:
    lines = [key.path, _wrapped(key.meaning, 1), f"  type     {key.type}", f"  default  {key.default}"]
    if below:
        lines.append("  keys")
    for path in below:
        lines += _described(known[path].path, known[path], 2)
    return lines


def _about_option(found: Sequence[tuple[PartEntry, Key]]) -> list[str]:
    lines = [f"{found[0][1].path}, an option of: {', '.join(part.name for part, _ in found)}"]
    for part, option in found:
        lines += _described(part.name, option, 1)
    return lines


def _about_place(place: Place) -> list[str]:
    lines = [f"  parts    of the family {place.family}; write NAME, or {{use: NAME, option: value}}"]
    for part in place.parts:
        lines += _with_options(part, 2)
    return lines


def _about_part(held: Collection[Place], family: str, name: str) -> list[str]:
    found = next((place for place in held if family in (place.family, _plain(place.path))), None)
    if found is None:
        families = [place.family for place in held]
        nearest = did_you_mean(family, families)
        raise InputError(
            f"--explain {family}/{name}: unknown family '{family}'{nearest}; families: {', '.join(families)}"
        )
    for part in found.parts:
        if part.name == name:
            return [f"{found.path}, a part of the family {found.family}", *_with_options(part, 1)]
    named = [part.name for part in found.parts]
    raise InputError(
        f"--explain {family}/{name}: unknown part '{name}'{did_you_mean(name, named)}; "
        f"parts: {', '.join(named) or 'none'}"
    )


def _with_options(part: PartEntry, depth: int) -> list[str]:
    lines = [_wrapped(f"{part.name}: {part.meaning}" if part.meaning else part.name, depth, hang=1)]
    for option in part.options:
        lines += _described(option.name, option, depth + 1)
    return lines


def _described(name: str, key: Key, depth: int) -> list[str]:
    meaning = [_wrapped(key.meaning, depth + 1)] if key.meaning else []
    return [_wrapped(f"{name}: {key.kind}", depth, hang=2), *meaning]


def _nearest(path: str, known: Collection[str]) -> str:
    """Return a hint for an unknown key; a key that is given without its section is found by its last steps."""
    tops = dict.fromkeys(each.partition(".")[0] for each in known)
    ends = [top for top in tops if path and top.startswith(path)]
    ends += [each for each in known if each.endswith(f".{path}")]
    if ends:
        return f" - did you mean {' or '.join(repr(each) for each in ends[:3])}?"
    return did_you_mean(path, known) or f"; keys: {', '.join(tops)}"


# Keys as Markdown


def _markdown(text: str) -> str:
    return text.replace("|", "\\|")


def _table(rows: Sequence[Key], linked: Collection[str] = ()) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        name = f"[`{row.path}`](#{row.path})" if row.path in linked else f"`{row.path}`"
        lines.append(f"| {name} | {_cells(row)} |")
    return lines


def _part_table(place: Place) -> list[str]:
    lines = ["| part | option | type | default | meaning |", "|---|---|---|---|---|"]
    for part in place.parts:
        lines.append(f"| `{part.name}` | | | | {_markdown(part.meaning)} |")
        lines += [f"| `{part.name}` | `{option.name}` | {_cells(option)} |" for option in part.options]
    return lines


def _cells(key: Key) -> str:
    default = key.default if key.default == REQUIRED else f"`{key.default}`"
    return f"{_markdown(key.type)} | {default} | {_markdown(key.meaning)}"
