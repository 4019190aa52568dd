"""Observers: called in isolation, counted, logged once."""

import logging
from typing import Any, cast

import pytest

from hpdm_core.cell import Cell
from hpdm_core.hookspecs import hookimpl
from hpdm_core.plugins import build_plugins
from hpdm_core.plugins.observers import Observers

CELL = cast(Cell, object())


class Noting:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def after_level_sampled(self, cell: Any, level: int, videos: Any) -> None:
        assert cell is CELL
        self.seen.append((level, videos))


class Failing:
    @hookimpl
    def after_level_sampled(self, level: int) -> None:
        raise ValueError(f"level {level}")


def test_each_gets_the_arguments_it_asks_for_in_pluggy_order() -> None:
    order: list[str] = []

    class First:
        @hookimpl
        def on_cell_error(self, error: BaseException) -> None:
            order.append(f"first {error}")

    class Second:
        @hookimpl
        def on_cell_error(self) -> None:
            order.append("second")

    Observers(build_plugins(objects=(First(), Second())), CELL).call("on_cell_error", error=OSError("x"))
    assert order == ["second", "first x"]


def test_one_that_raises_hides_no_other_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    before, after = Noting(), Noting()
    observers = Observers(build_plugins(objects=(before, Failing(), after)), CELL)
    with caplog.at_level(logging.WARNING):
        for level in range(3):
            observers.call("after_level_sampled", level=level, videos="v")
    assert before.seen == after.seen == [(0, "v"), (1, "v"), (2, "v")]
    assert len(caplog.messages) == 1
    (line,) = observers.errors
    assert line.endswith("after_level_sampled: ValueError: level 0 (3x)")
    assert "Failing" in line


def test_ctrl_c_is_no_mistake_of_an_observer() -> None:
    class Interrupted:
        @hookimpl
        def after_level_sampled(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers(build_plugins(objects=(Interrupted(),)), CELL).call(
            "after_level_sampled", level=0, videos=None
        )


def test_without_a_cell_nothing_is_called() -> None:
    noting = Noting()
    Observers(build_plugins(objects=(noting,)), None).call("after_level_sampled", level=0, videos=None)
    assert noting.seen == []
