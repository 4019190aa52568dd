"""What ``search:`` may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hpdm_core.base.errors import InputError
from hpdm_core.config.search import Dimension, SearchKeys
from hpdm_core.study.plan.study_file import StudyConfig, load_study

BASE: dict[str, Any] = {
    "extends": "tiny_clips",
    "evaluation": {"metrics": ["throughput", "held_out_loss"]},
    "arms": {"default": {}, "none": {"model.context_fusion": "none"}},
}
SEARCH: dict[str, Any] = {
    "space": {"training.learning_rate": {"float": [1e-4, 1e-2], "log": True}},
    "proposals": 4,
    "objective": {"metric": "held_out_loss"},
}


def load(folder: Path, **changes: Any) -> StudyConfig:
    """Load a study with ``changes`` to its search; None drops a key."""
    search = {key: value for key, value in {**SEARCH, **changes}.items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**BASE, "search": search}, sort_keys=False))
    return load_study(path)


def refused(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        load(folder, **changes)
    lines = list(error.value.messages)
    # Every line says where: in the file, at the section or below.
    first = next(
        number
        for number, text in enumerate((folder / "study.yaml").read_text().splitlines(), 1)
        if "search" in text
    )
    for line in lines:
        place, _, _ = line.partition(": ")
        assert place.startswith(f"{folder / 'study.yaml'}:") and int(place.rpartition(":")[2]) >= first
    return lines


def test_a_search_with_its_defaults(tmp_path: Path) -> None:
    search = load(tmp_path).search
    assert search is not None
    assert (search.sampler.use, search.pruner.use, search.budget, search.seeds) == ("tpe", "none", 4, None)
    assert search.objectives[0].level == "finest" and search.objectives[0].direction == "minimize"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sampler": "tpee"},
            "unknown sampler 'tpee' - did you mean 'tpe'?; samplers: tpe, gp, random, grid, brute",
        ),
        (
            {"sampler": {"use": "tpe", "startupp": 3}},
            "unknown key - did you mean 'startup'? (option of 'tpe')",
        ),
        (
            {"pruner": "mdian"},
            "unknown pruner 'mdian' - did you mean 'median'?; pruners: none, median, hyperband",
        ),
        (
            {"pruner": {"use": "patient", "patience": 0}},
            "search.pruner.patience: should be greater than 0, got 0",
        ),
        ({"proposals": None}, "search.proposals: missing; sampler 'tpe' never ends by itself"),
        ({"proposal": 3}, "search.proposal: unknown key - did you mean 'proposals'?"),
        (
            {"objective": {"metric": "held_out_los"}},
            "'held_out_los' is not measured - did you mean 'held_out_loss'?",
        ),
        ({"objective": {"metric": "throughput.x", "levl": 1}}, "levl: unknown key - did you mean 'level'?"),
        (
            {"objective": {"metric": "held_out_loss", "direction": "down"}},
            "should be 'minimize' or 'maximize'",
        ),
        ({"seeds": [1, 1]}, "search.seeds: each seed once, got [1, 1]"),
        ({"space": {}}, "search.space: should have at least 1 items, got {}"),
        (
            {"space": {"trainig.learning_rate": {"float": [1, 2]}}},
            "not a key that can be searched - did you mean 'training'?",
        ),
        (
            {"space": {"runtime.threads": {"int": [1, 2]}}},
            "not a key that can be searched; searched may be keys of",
        ),
        (
            {"space": {"training.learning_rat": {"float": [1, 2]}}},
            "training.learning_rat: unknown key - did you mean 'learning_rate'?",
        ),
        (
            {"space": {"training.learning_rate": {"float": [-1.0, 2.0]}}},
            "training.learning_rate: should be greater",
        ),
        (
            {"space": {"training.steps": {"int": [1, 2], "flot": 1}}},
            "flot: unknown key - did you mean 'float'?",
        ),
        (
            {"space": {"training.steps": {"step": 2}}},
            "should have exactly one of float, int, choices, has none",
        ),
        ({"space": {"training.steps": {"int": [5, 2]}}}, "should be [lowest, highest]"),
        ({"space": {"training.steps": {"int": [1, 9], "step": 1.5}}}, "the step of an int should be whole"),
        (
            {"space": {"training.learning_rate": {"float": [0, 1], "log": True}}},
            "log takes a lowest value above 0",
        ),
        (
            {"space": {"model.backbone": {"choices": ["rin", "rim"]}}},
            "unknown part 'rim' of backbones - did you mean 'rin'?",
        ),
        (
            {"space": {"model.context_fusion": {"choices": ["deep", "none"]}}},
            "arm 'none' sets model.context_fusion itself; allowed: keys that no arm sets",
        ),
        ({"sampler": "grid"}, "sampler 'grid' takes every value: give a step, or choices"),
        (
            {
                "pruner": "median",
                "objective": [
                    {"metric": "held_out_loss"},
                    {"metric": "throughput.videos_per_second", "direction": "maximize"},
                ],
            },
            "search.pruner: 'median' needs one objective, got 2; allowed is none",
        ),
    ],
)
def test_what_is_wrong_is_a_line_with_its_place(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    lines = refused(tmp_path, **changes)
    assert any(said in line for line in lines), lines
    assert len(lines) <= 2  # one per arm at most


def test_the_place_of_a_value_is_its_own_line(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, space={"training.learning_rate": {"float": [1e-4, 1e-2]}}, sampler="grid")
    text = (tmp_path / "study.yaml").read_text().splitlines()
    assert "training.learning_rate" in text[int(line.split(":")[1]) - 1]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"int": [2, 8], "step": 3}, (2, 5, 8)),
        ({"int": [2, 4]}, (2, 3, 4)),
        ({"float": [0.0, 0.3], "step": 0.1}, (0.0, 0.1, 0.2, 0.30000000000000004)),
        ({"choices": ["a", None, {"use": "x"}]}, ("a", None, {"use": "x"})),
        ({"float": [0.0, 1.0]}, None),
    ],
)
def test_the_values_of_an_axis(axis: dict[str, Any], values: Any) -> None:
    assert Dimension.model_validate(axis).values == values


@pytest.mark.parametrize(
    ("sampler", "proposals", "budget"), [("grid", None, 6), ("grid", 4, 4), ("tpe", 9, 9)]
)
def test_the_budget(sampler: str, proposals: int | None, budget: int) -> None:
    search = SearchKeys.model_validate(
        {
            "space": {"model.blocks": {"int": [1, 3]}, "model.levels": {"choices": [1, 2]}},
            "sampler": sampler,
            "proposals": proposals,
            "objective": {"metric": "x"},
        }
    )
    assert search.size == 6 and search.budget == budget


def test_an_arm_varied(tmp_path: Path) -> None:
    study = load(tmp_path)
    varied = study.vary("none", {"training.learning_rate": 0.005})
    assert varied.training.learning_rate == 0.005
    assert varied.model == study.configs["none"].model
    with pytest.raises(InputError, match="learning_rate: should be greater than 0"):
        study.vary("none", {"training.learning_rate": -1.0})
