import functools
from typing import TYPE_CHECKING, Annotated, Literal

import pytest
from pydantic import Field

from hpdm_core.config.problems import check
from hpdm_core.config.schema import Part
from hpdm_core.hookspecs import hookimpl
from hpdm_core.plugins import build_plugins
from hpdm_core.plugins.families import FAMILIES
from hpdm_core.plugins.options import FactoryError, described, options_model

if TYPE_CHECKING:
    from hpdm_core.model.fusion import FusionShape

FUSIONS = FAMILIES["context_fusions"]


def model_of(factory, family=FUSIONS):
    return options_model(family, "mine", factory)


def test_keyword_only_parameters_become_options() -> None:
    class Fusion:
        def __init__(self, shape: "FusionShape", *, width: int, gain: float = 2.0) -> None: ...

    model = model_of(Fusion)
    assert list(model.model_fields) == ["width", "gain"]
    made, problems = check(model, {"width": 3})
    assert problems == [] and (made.width, made.gain) == (3, 2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "width: missing"),
        ({"width": 3, "gian": 1.0}, "gian: unknown key - did you mean 'gain'?"),
        ({"width": "3"}, "width: should be a valid integer, got '3'"),
        ({"width": True}, "width: should be a valid integer, got true"),
        ({"width": 2.5}, "width: should be a valid integer, got 2.5"),
        ({"width": 0}, "width: should be greater than 0, got 0"),
        ({"width": 1, "axes": ["x"]}, "axes[0]: should be 'f', 'h' or 'w', got 'x'"),
        ({"width": 1, "gain": float("nan")}, "gain: should be a finite number"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    def fusion(
        shape: object,
        *,
        width: Annotated[int, Field(gt=0)],
        gain: float = 2.0,
        axes: tuple[Literal["f", "h", "w"], ...] = (),
    ) -> None: ...

    made, problems = check(model_of(fusion), options)
    assert made is None and len(problems) == 1
    assert str(problems[0]).startswith(words)


def test_a_list_is_a_tuple_and_an_integer_a_float() -> None:
    def fusion(shape: object, *, values: tuple[float, ...] = ()) -> None: ...

    made, _ = check(model_of(fusion), {"values": [1, 2.5]})
    assert made.values == (1.0, 2.5) and isinstance(made.values[0], float)


def wrong_positional(form: object, *, a: int = 1) -> None: ...
def missing_positional(*, a: int = 1) -> None: ...
def extra_positional(shape: object, a: int) -> None: ...
def any_keywords(shape: object, **options: int) -> None: ...
def any_positional(*things: object) -> None: ...
def bare_option(shape: object, *, a=1) -> None: ...
def private_option(shape: object, *, _a: int = 1) -> None: ...
def reserved_option(shape: object, *, copy: int = 1) -> None: ...
def use_option(shape: object, *, use: int = 1) -> None: ...
def unknown_annotation(shape: object, *, a: "Nowhere" = 1) -> None: ...  # noqa: F821
def foreign_annotation(shape: object, *, a: functools.partial | None = None) -> None: ...
def part_without_family(shape: object, *, a: Part) -> None: ...
def part_of_unknown_family(shape: object, *, a: Annotated[Part, "solver"]) -> None: ...


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (wrong_positional, r"\(form\); context_fusions are handed \(shape\)"),
        (missing_positional, r"handed \(shape\)"),
        (extra_positional, r"\(shape, a\)"),
        (any_keywords, r"\*\*options"),
        (any_positional, r"\*things"),
        (bare_option, "'a' has no annotation; write 'a: TYPE'"),
        (private_option, "reserved name"),
        (reserved_option, "reserved name"),
        (use_option, "reserved name"),
        (unknown_annotation, "cannot be evaluated: name 'Nowhere'"),
        (foreign_annotation, "cannot hold"),
        (part_without_family, "a part of no family"),
        (part_of_unknown_family, "'solver'"),
        (3, "not a class or function"),
    ],
)
def test_factories_that_break_the_rules(factory, words: str) -> None:
    with pytest.raises(FactoryError, match=words):
        model_of(factory)


def no_grid(token_dim: int, blocks: int, *, a: int = 1) -> object:
    return token_dim, blocks, a


def with_grid(token_dim: int, blocks: int, grid: object, *, a: int = 1) -> object:
    return token_dim, blocks, grid, a


def wrong_grid(token_dim: int, blocks: int, shape: object) -> None: ...
def no_blocks(token_dim: int, *, a: int = 1) -> None: ...


@pytest.mark.parametrize(("factory", "made"), [(no_grid, (8, 2, 3)), (with_grid, (8, 2, (1, 2, 2), 3))])
def test_an_optional_positional_parameter_is_handed_to_who_names_it(factory, made: object) -> None:
    class Plugin:
        @hookimpl
        def register_backbones(self, register) -> None:
            register("mine", factory, source="me")

    plugins = build_plugins(objects=[Plugin()])
    assert plugins.make("backbones", Part(use="mine", options={"a": 3}), 8, 2, (1, 2, 2)) == made


@pytest.mark.parametrize("factory", [wrong_grid, no_blocks])
def test_a_backbone_takes_the_grid_under_its_name_or_not_at_all(factory) -> None:
    words = r"handed \(token_dim, blocks\), and grid where they name it, .*\(token_dim, blocks, grid, \*, \.\.\.\)"
    with pytest.raises(FactoryError, match=words):
        options_model(FAMILIES["backbones"], "mine", factory)


def test_annotations_of_what_the_core_hands_over_are_never_evaluated() -> None:
    def fusion(shape: "OnlyForTypeCheckers", *, a: "int" = 1) -> None: ...  # noqa: F821

    assert list(model_of(fusion).model_fields) == ["a"]


def test_a_partial_is_a_factory() -> None:
    def fusion(shape: object, *, a: int = 1, b: int = 2) -> None: ...

    model = model_of(functools.partial(fusion, b=7))
    assert check(model, {})[0].b == 7


def test_described() -> None:
    def fusion(
        shape: object,
        *,
        a: int,
        b: Annotated[int, Field(gt=0)] | None = None,
        c: tuple[float, ...] = (1.0,),
        d: Annotated[Part, "solvers"] = Part(use="edm"),  # noqa: B008 - frozen
    ) -> None: ...

    assert described(model_of(fusion)) == [
        ("a", "int", "required"),
        ("b", "int (Gt(gt=0)) | None", "None"),
        ("c", "tuple[float, ...]", "(1.0,)"),
        ("d", "Part (solvers)", "edm"),
    ]
