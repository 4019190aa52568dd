"""What the report makes of search.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.report.search import pareto_figure, pareto_set, search_tables

LOSS = {"name": "loss, finest level", "metric": "loss", "direction": "minimize"}
SPEED = {"name": "speed, mean over levels", "metric": "speed", "direction": "maximize"}


def proposal(
    number: int, *objectives: float, state: str = "done", x: float = 0.5, **facts: Any
) -> dict[str, Any]:
    values = {"training.learning_rate": x}
    return {
        "number": number,
        "values": values,
        "state": state,
        "objectives": list(objectives) or None,
        **facts,
    }


def write(folder: Path, arms: dict[str, Any], *objectives: Any, **changes: Any) -> dict[str, Any]:
    search = {
        "space": {"training.learning_rate": {"float": [0.01, 1.0], "log": False}},
        "objectives": list(objectives) or [LOSS],
        "sampler": {"use": "tpe"},
        "pruner": {"use": "none"},
        "budget": 2,
        "seeds": [100],
        "final_seeds": [0, 1],
        "arms": arms,
        **changes,
    }
    (folder / "search.json").write_text(json.dumps(search))
    return search


def test_a_study_without_a_search_has_no_such_table(tmp_path: Path) -> None:
    assert search_tables(tmp_path) == [] and pareto_figure(tmp_path) is None


def test_the_best_of_each_arm_and_what_it_took(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a": [
                proposal(0, 2.0, steps=10, seconds=3600.0),
                proposal(1, 1.0, x=0.25, steps=10, seconds=1800.0),
            ],
            "b": [proposal(0, 3.0), proposal(1, state="pruned", steps=4)],
        },
    )
    (table,) = search_tables(tmp_path)
    a = table.cells.loc["a"]
    assert (a["proposals"], a["done"], a["given up"], a["steps"], a["hours"]) == (
        "2 of 2",
        "2",
        "0",
        "20",
        "1.500",
    )
    assert a["loss, finest level"] == "1.000" and a["training.learning_rate"] == "0.25"
    assert table.cells.loc["b"]["given up"] == "1"
    assert table.first == ""
    assert "do not compare arms by this column" in table.caption
    assert "run with seeds 0, 1, none of which the search used" in table.caption


def test_of_an_objective_to_be_maximized_the_largest(tmp_path: Path) -> None:
    write(tmp_path, {"a": [proposal(0, 2.0), proposal(1, 5.0)]}, SPEED)
    assert search_tables(tmp_path)[0].cells.loc["a"]["speed, mean over levels"] == "5.000"


@pytest.mark.parametrize(
    ("arms", "changes", "said"),
    [
        ({"a": [proposal(0, 1.0)] * 2, "b": [proposal(0, 1.0)]}, {}, "not had the same budget: a 2, b 1."),
        ({"a": [proposal(0, 1.0)]}, {}, "The search of a has not ended."),
        ({"a": [proposal(0, 1.0), proposal(1, state="running")]}, {}, "The search of a has not ended."),
        ({"a": [proposal(0, state="failed")] * 2}, {}, "No proposal of a is done."),
        ({"a": [proposal(0, 1.0, x=0.995)] * 2}, {}, "lies at the edge of training.learning_rate"),
    ],
)
def test_what_must_not_be_overlooked(tmp_path: Path, arms: Any, changes: Any, said: str) -> None:
    write(tmp_path, arms, **changes)
    assert said in search_tables(tmp_path)[0].first


def test_seeds_that_were_searched_with_flatter(tmp_path: Path) -> None:
    write(tmp_path, {"a": [proposal(0, 1.0)] * 2}, seeds=[1, 5])
    assert (
        "the search used 1 of these too, so results on them are optimistic"
        in search_tables(tmp_path)[0].caption
    )


def test_the_pareto_set(tmp_path: Path) -> None:
    arms = {
        "a": [proposal(0, 1.0, 1.0), proposal(1, 2.0, 3.0), proposal(2, 2.0, 2.0)],
        "b": [
            proposal(0, 3.0, 3.0),
            proposal(1, 4.0, 9.0),
            proposal(2, state="failed"),
            proposal(3, 2.0, 3.0),
        ],
    }
    search = write(tmp_path, arms, LOSS, SPEED)
    members = [(arm, each["number"]) for arm, each in pareto_set(search)]
    assert members == [("a", 0), ("a", 1), ("b", 3), ("b", 1)]  # equals stay, what is beaten in both goes
    _, table = search_tables(tmp_path)
    assert list(table.cells.index) == ["a#0", "a#1", "b#3", "b#1"]
    assert "Of 6 proposals" in table.caption and "other seeds may give another set" in table.caption
    picture = pareto_figure(tmp_path)
    assert picture is not None and picture.startswith(b"\x89PNG")
