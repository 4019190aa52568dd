"""A part's options: the keyword-only parameters of its factory, as a pydantic model.

The positional parameters of a factory are passed by the core (`hpdm_core.plugins.families`); options, which the
user may set, are keyword-only and annotated. An option that names another part, such as a metric's extractor, is
annotated ``Annotated[Part, "feature_extractors"]``.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PydanticUserError, create_model

from hpdm_core.config.schema import Part
from hpdm_core.plugins.families import FAMILIES, Family

__all__ = ["FactoryError", "described", "handed", "named_family", "options_from", "options_model", "parts_of"]

STRICT = ConfigDict(
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    protected_namespaces=(),
    arbitrary_types_allowed=False,
    validate_default=True,
)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


RESERVED = ("use", "options")  # keys of a part in a study file


class FactoryError(Exception):
    """A factory breaks the rules of its family. The message is appended to "PLUGIN registers KEY: "."""


def options_model(family: Family, key: str, factory: Callable[..., Any]) -> type[BaseModel]:
    """Return the pydantic model of the options of ``factory``: frozen, without extra fields, with defaults.

    Raises FactoryError for a signature that does not match the family.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise FactoryError(f"{factory!r} is not a class or function with a signature ({error})") from error
    parameters = list(signature.parameters.values())
    _check_kinds(family, parameters)
    options = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option.annotation is inspect.Parameter.empty:
            raise FactoryError(f"option '{option.name}' has no annotation; write '{option.name}: TYPE'")
        if option.name.startswith("_") or option.name in RESERVED or hasattr(BaseModel, option.name):
            raise FactoryError(f"option '{option.name}' has a reserved name; choose another")
    annotations = _evaluated(factory, options)
    fields: dict[str, Any] = {}
    for option in options:
        annotation = annotations[option.name]
        if _mentions_part(annotation):
            named_family(option.name, annotation)
        default = ... if option.default is inspect.Parameter.empty else option.default
        fields[option.name] = (annotation, default)
    try:
        return create_model(f"{family.name}/{key}", __config__=STRICT, **fields)
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise FactoryError(f"an option has a type that a study file cannot hold: {reason}") from error


def options_from(
    model: type[BaseModel], *positional: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a factory that takes ``**options``: its options are the fields of ``model``, with their limits.

    For a part whose options are already defined as a model. ``positional``: names of the factory's positional
    parameters (`Family.positional`).
    """

    def mark(factory: Callable[..., Any]) -> Callable[..., Any]:
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in positional]
        for name, field in model.model_fields.items():
            annotation: Any = field.annotation
            for mark in field.metadata:
                annotation = Annotated[annotation, mark]
            default = (
                inspect.Parameter.empty
                if field.is_required()
                else field.get_default(call_default_factory=True)
            )
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
                )
            )
        factory.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        factory.options_model = model  # type: ignore[attr-defined]  # for those who explain the options
        return factory

    return mark


def handed(factory: Callable[..., Any], positional: Sequence[Any]) -> Sequence[Any]:
    """Return those of the family's ``positional`` values (optional ones at the end) that ``factory`` takes."""
    parameters = inspect.signature(factory).parameters.values()
    return positional[: sum(parameter.kind in POSITIONAL for parameter in parameters)]


def _check_kinds(family: Family, parameters: list[inspect.Parameter]) -> None:
    wanted = f"({', '.join((*family.positional, *family.optional, '*', '...'))})"
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise FactoryError(
                f"its factory takes **{parameter.name}; name every option, so that it can be checked: {wanted}"
            )
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise FactoryError(f"its factory takes *{parameter.name}; allowed is {wanted}")
    positional = tuple(parameter.name for parameter in parameters if parameter.kind in POSITIONAL)
    least, most = len(family.positional), (*family.positional, *family.optional)
    if len(positional) < least or positional != most[: len(positional)]:
        more = f", and {', '.join(family.optional)} where they name it" if family.optional else ""
        raise FactoryError(
            f"its factory has the positional parameters ({', '.join(positional)}); "
            f"{family.name} are handed ({', '.join(family.positional)}){more}, options stand after '*': {wanted}"
        )


def _evaluated(factory: Callable[..., Any], options: list[inspect.Parameter]) -> dict[str, Any]:
    """Evaluate the annotations of the options only: other annotations may exist only for type checkers."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    function: Any = inspect.unwrap(factory)
    if inspect.isclass(function):
        function = function.__init__
    elif not hasattr(function, "__globals__") and not inspect.ismethod(function):
        function = type(function).__call__
    namespace = getattr(inspect.unwrap(function), "__globals__", {})

    def holder() -> None: ...

    holder.__annotations__ = {option.name: option.annotation for option in options}
    try:
        return typing.get_type_hints(holder, globalns=namespace, include_extras=True)
    except Exception as error:
        raise FactoryError(f"the annotation of an option cannot be evaluated: {error}") from error


def _walk(annotation: Any) -> Iterator[Any]:
    yield annotation
    if typing.get_origin(annotation) is Annotated:
        yield from _walk(typing.get_args(annotation)[0])
    else:
        for argument in typing.get_args(annotation):
            yield from _walk(argument)


def _mentions_part(annotation: Any) -> bool:
    return any(item is Part for item in _walk(annotation))


def named_family(option: str, annotation: Any) -> str | None:
    """Return the family of the parts in an option's annotation; None if the annotation contains no part.

    Raises FactoryError for a part without a family, an unknown family, or two families.
    """
    if not _mentions_part(annotation):
        return None
    named = {
        mark
        for item in _walk(annotation)
        if typing.get_origin(item) is Annotated and typing.get_args(item)[0] is Part
        for mark in typing.get_args(item)[1:]
        if isinstance(mark, str)
    }
    if len(named) != 1 or not named <= set(FAMILIES):
        raise FactoryError(
            f"option '{option}' is a part of {sorted(named) or 'no family'}; "
            "write Annotated[Part, FAMILY] with one of: " + ", ".join(FAMILIES)
        )
    return named.pop()


def parts_of(model: type[BaseModel], options: BaseModel) -> dict[str, tuple[str, Any]]:
    """Return option -> (family, value) for the options whose value is a part or contains parts."""
    hints = typing.get_type_hints(model, include_extras=True)
    found = {}
    for name in model.model_fields:
        family = named_family(name, hints[name])
        if family is not None:
            found[name] = (family, getattr(options, name))
    return found


def described(model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Return (option, type, default) of each option as text; "required" where there is no default."""
    hints: Mapping[str, Any] = typing.get_type_hints(model, include_extras=True)
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default_text(field.default)
        rows.append((name, _type_text(hints[name]), default))
    return rows


def _default_text(value: Any) -> str:
    return value.use if isinstance(value, Part) and not value.options else repr(value)


def _type_text(annotation: Any) -> str:
    """Return an annotation as text, as it is written in the source, including limits of a number."""
    if typing.get_origin(annotation) is Annotated:
        inside, *marks = typing.get_args(annotation)
        limits = [repr(limit) for mark in marks for limit in getattr(mark, "metadata", ())]
        limits += [mark for mark in marks if isinstance(mark, str)]
        return _type_text(inside) + (f" ({', '.join(limits)})" if limits else "")
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(_type_text(each) for each in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return " | ".join(repr(each) for each in typing.get_args(annotation))
    inner = typing.get_args(annotation)
    if inner:
        texts = ["..." if each is ... else _type_text(each) for each in inner]
        return f"{typing.get_origin(annotation).__name__}[{', '.join(texts)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
