from pathlib import Path

import pytest

from hpdm_core.config.schema import CellConfig
from hpdm_core.study.plan.cells import cells_of
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


def test_cells_go_seed_by_seed_and_start_with_the_baseline(file: str, tmp_path: Path) -> None:
    cells, others = cells_of(load_study(file), tmp_path / "store")
    order = [(cell.seed, cell.arm) for cell in cells]
    assert order == [(4, "b"), (4, "a"), (4, "c"), (0, "b"), (0, "a"), (0, "c")] and others == []
    assert {cell.study for cell in cells} == {"s"} and not (tmp_path / "store").exists()


def test_a_cell_has_its_arms_configuration_and_its_seed(file: str, tmp_path: Path) -> None:
    cell = cells_of(load_study(file), tmp_path)[0][-1]
    assert (cell.config.seed, cell.config.training.steps) == (0, 2)
    assert CellConfig.model_validate_json(cell.config.model_dump_json()) == cell.config


def test_only_sets_the_other_arms_apart(file: str, tmp_path: Path) -> None:
    cells, others = cells_of(load_study(file, only=["c"]), tmp_path)
    assert [cell.arm for cell in cells] == ["c", "c"]
    assert [cell.arm for cell in others] == ["b", "a", "b", "a"]


def test_a_cells_spec_names_the_plugins_that_rebuild_it(file: str, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from hpdm_core import hookimpl\n@hookimpl\ndef after_cell_finished(cell): ...\n",
    )
    cells, _ = cells_of(load_study(file, plugins=[str(plugin)]), tmp_path)
    assert {tuple(cell.spec()["plugins"]) for cell in cells} == {(str(plugin),)}
