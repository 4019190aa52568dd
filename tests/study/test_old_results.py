"""A results folder that an earlier version wrote goes on: nothing is done again, and the report is the same.

tests/study/old_results.tar.gz holds a study of three arms (one starts from another) and what it left behind on
2026-11-27, less the weights of one of the two seeds, which are made again only when they are needed. It is never
written anew: a change that cannot read it takes people's results away.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from hpdm_core.report.__main__ import main as report
from hpdm_core.study.__main__ import main
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study

TABLES = ("table.md", "table.tex", "results.csv")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).with_name("old_results.tar.gz")) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[str, bytes]:
    """What the stages left behind."""
    store = folder / "results" / "store"
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def tables(folder: Path) -> dict[str, str]:
    return {name: (folder / "results" / "old" / "report" / name).read_text() for name in TABLES}


def test_nothing_is_done_again_and_the_report_is_the_same(folder: Path) -> None:
    cells, _ = cells_of(load_study("old.yaml"), folder / "results" / "store")
    assert len(cells) == 6 and [cell.name for cell in cells if cell.missing()] == []
    store, shown = written(folder), tables(folder)
    assert len(shown["table.md"]) > 5000
    for path in (folder / "results" / "old" / "report").iterdir():
        path.unlink()
    assert report(["results/old"]) == 0
    assert tables(folder) == shown
    assert main(["old.yaml"]) == 0
    assert written(folder) == store
    assert (
        tables(folder)["results.csv"] == shown["results.csv"]
    )  # the others may say that versions have changed


def test_a_cell_that_is_asked_for_more_goes_on_from_its_weights(folder: Path) -> None:
    trained = written(folder)
    more = ["--set", "evaluation.samples=6", "--only", "started", "--set", "seeds=[0]"]
    assert main(["old.yaml", *more]) == 0
    grown = written(folder)
    changed = {name for name in grown if grown[name] != trained.get(name)}
    assert changed and not any(name.startswith("train/") for name in changed)
    assert sum(name.endswith("000005.safetensors") for name in changed) == 1
    assert not any(name.endswith("000003.safetensors") for name in changed)
