from pathlib import Path

import pytest

from hpdm_core.config.schema import CellConfig
from hpdm_core.study.plan.design import plan
from hpdm_core.study.plan.study_file import load_study

STUDY = """
model: {video: [4, 8, 16], patch: [2, 4, 8], token: [1, 2, 2], levels: 2, token_dim: 16, blocks: 2}
data: {dataset: synthetic}
training: {steps: 10, batch: 2, learning_rate: 1e-3}
arms: {a: {training.steps: 1}, b: {}, c: {training.steps: 2}}
baseline: b
seeds: [4, 0]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    return str(path)


def test_cells_go_seed_by_seed_and_start_with_the_baseline(file: str) -> None:
    design = plan(load_study(file))
    order = [(cell.seed, cell.arm) for cell in design.cells]
    assert order == [(4, "b"), (4, "a"), (4, "c"), (0, "b"), (0, "a"), (0, "c")]
    assert (design.study, design.baseline, design.arms) == ("s", "b", ("a", "b", "c"))
    assert design.seeds == (4, 0)


def test_a_cell_has_its_arms_configuration_and_its_seed(file: str) -> None:
    cell = plan(load_study(file)).cells[-1]
    assert (cell.config.seed, cell.config.training.steps) == (0, 2)
    assert CellConfig.model_validate_json(cell.config.model_dump_json()) == cell.config


def test_only_plans_the_selected_arms_and_keeps_the_baselines_name(file: str) -> None:
    design = plan(load_study(file, only=["c"]))
    assert [cell.arm for cell in design.cells] == ["c", "c"] and design.baseline == "b"


def test_cells_name_the_plugins_that_rebuild_them(file: str, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from hpdm_core import hookimpl\n@hookimpl\ndef after_cell_finished(cell): ...\n",
    )
    design = plan(load_study(file, plugins=[str(plugin)]))
    assert {cell.plugins for cell in design.cells} == {(str(plugin),)}
