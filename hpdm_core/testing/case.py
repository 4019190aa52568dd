"""The base class of conformance classes: it builds the part under test and formats failed checks.

A conformance class is the contract of one family as runnable checks. Its methods named ``test_*`` take only
``self``, so that the class can be used in three ways: by pytest (subclass it under a name that starts with
``Test``), by this project's tests (for every registered key), and by ``python -m hpdm_core.plugins check NAME``.

    class TestMine(ContextFusionCases):          # a plugin author's whole test file
        factory = MyFusion
        options = {"width": 8}

Instead of ``factory``, a class may set ``plugins`` (from `hpdm_core.plugins.build_plugins`) and ``key``: then
the part is built exactly as in a study, with validated options.
"""

from __future__ import annotations

import inspect
import json
import traceback
import unittest
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import keyed_global_rng
from hpdm_core.config.content import marked, mentions_path
from hpdm_core.config.problems import check
from hpdm_core.config.schema import Part
from hpdm_core.plugins.families import FAMILIES
from hpdm_core.plugins.options import FactoryError, handed, options_model

if TYPE_CHECKING:
    from hpdm_core.plugins import Plugins

__all__ = ["Case", "describe_failure", "expect", "expect_close", "expect_json", "leaves_global_rng_alone"]


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``condition``; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def expect_close(given: Tensor, wanted: Tensor, what: str, *, tolerance: float = 0.0) -> None:
    """Raise AssertionError unless both tensors have the same shape and differ by at most ``tolerance`` anywhere.

    The tolerance is relative to the largest magnitude in ``wanted`` if that exceeds 1. NaN never passes.
    """
    expect(given.shape == wanted.shape, f"{what}: shape {list(given.shape)}, wanted {list(wanted.shape)}")
    if given.numel() == 0:
        return
    difference = (given.detach().double() - wanted.detach().double()).abs().max().item()
    bound = tolerance * max(1.0, wanted.detach().double().abs().max().item())
    expect(difference <= bound, f"{what}: differs by {difference:.3g}, allowed {bound:.3g}")


def expect_json(value: Any, what: str) -> str:
    """Return ``value`` as strict JSON text; raise AssertionError if it is not JSON (tensors, paths, NaN, sets ...)."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what}: is not JSON: {error}") from error
    expect(
        json.loads(text) == value,
        f"{what}: changes when written as JSON and read back (tuples? integer keys?)",
    )
    return text


@contextmanager
def leaves_global_rng_alone(what: str) -> Iterator[None]:
    """Raise AssertionError if the block draws from torch's global generator or seeds it."""
    before = torch.random.get_rng_state()
    yield
    untouched = torch.equal(before, torch.random.get_rng_state())
    expect(
        untouched, f"{what}: uses torch's global random numbers; draw from the generator that is handed in"
    )


def describe_failure(error: BaseException, *, file: Path | None = None) -> str:
    """Return one line for a failed check: the error, and where it was raised in ``file`` (or in the innermost frame
    outside torch).
    """
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):
        return text or "AssertionError"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and not frame.filename.startswith("<")
    ]
    inside = [frame for frame in frames if file is not None and Path(frame.filename) == file]
    found = inside or frames
    place = f" ({found[-1].filename}:{found[-1].lineno})" if found else ""
    return f"{type(error).__name__}: {text}{place}"


class Case:
    """Base of the conformance classes. Set ``factory``, or ``plugins`` and ``key``; ``options`` as in a study file."""

    family: ClassVar[str]
    """The family of `hpdm_core.plugins.families` whose contract this is."""

    plugins: Plugins | None = None
    key: str | None = None
    factory: Callable[..., Any] | None = None
    options: Mapping[str, Any] = {}
    """Options of the part; needed if the factory has options without a default."""

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of the checks in the order of their definition, those of base classes first."""
        names: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            names.update({name: None for name in vars(base) if name.startswith("test_")})
        return list(names)

    def missing_options(self) -> list[str]:
        """Return the names of options without a default that ``options`` does not give."""
        fields = self._model().model_fields
        return [name for name, field in fields.items() if field.is_required() and name not in self.options]

    def make(self, *positional: Any, seed: int = 0) -> Any:
        """Build the part as in a cell: with ``positional`` and ``options``, and torch's global generator seeded by
        ``seed``.
        """
        missing = self.missing_options()
        expect(not missing, f"needs options: {', '.join(missing)} (set `options` on the conformance class)")
        with keyed_global_rng(seed, "conformance"):
            if self.plugins is not None and self.key is not None:
                return self.plugins.make(self.family, self._part(), *positional)
            model = self._model()
            made, problems = check(model, dict(self.options))
            if made is None:
                raise InputError(*(str(problem) for problem in problems))
            factory = self._factory()
            options = {name: getattr(made, name) for name in model.model_fields}
            return factory(*handed(factory, positional), **options)

    def make_or_skip(self, *positional: Any) -> Any:
        """Build the part; if it refuses these values (InputError), skip the check with the error's message."""
        try:
            return self.make(*positional)
        except InputError as error:
            raise unittest.SkipTest(f"refused: {error}") from error

    def test_options_round_trip(self) -> None:
        """Options are valid, and written to JSON and read back they are equal: a study file can hold them."""
        expect(not self.missing_options(), f"needs options: {', '.join(self.missing_options())}")
        model = self._model()
        once, problems = check(model, dict(self.options))
        if once is None:
            raise InputError(*(str(problem) for problem in problems))
        text = expect_json(once.model_dump(mode="json"), "validated options")
        again, _ = check(model, json.loads(text))
        expect(again == once, f"options change when written to a file and read back: {text}")

    def test_places(self) -> None:
        """An option that is a path is marked ``Annotated[Path, Content()]``, so that keys depend on its content."""
        if FAMILIES[self.family].path.startswith("evaluation."):
            return  # their keys are made of their own protocol or description
        model = self._model()
        unmarked = sorted(mentions_path(model) - set(marked(model)))
        expect(
            not unmarked,
            f"the path in option {', '.join(unmarked)} would be part of the key, so that moving the files would "
            "train again: write Annotated[Path, Content()]",
        )

    def _part(self) -> Part:
        return Part(use=self.key or "", options=dict(self.options))

    def _factory(self) -> Callable[..., Any]:
        # A function set as a class attribute would become a bound method: take the attribute itself.
        written = self.__dict__.get("factory", inspect.getattr_static(type(self), "factory"))
        made = written.__func__ if isinstance(written, staticmethod) else written
        expect(callable(made), "set `factory`, or `plugins` and `key`, on the conformance class")
        return made

    def _model(self) -> type[BaseModel]:
        if self.plugins is not None and self.key is not None:
            return self.plugins.options(self.family, self.key)
        try:
            return options_model(FAMILIES[self.family], "under_test", self._factory())
        except FactoryError as error:
            raise AssertionError(str(error)) from error
