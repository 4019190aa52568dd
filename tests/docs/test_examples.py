"""docs/examples: every plugin passes its checks, is short, stands on the page, and works in a study."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpdm_core.plugins import FAMILIES, build_plugins
from hpdm_core.plugins.__main__ import main as plugins_command
from hpdm_core.study.__main__ import main as study_command
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.testing import run_conformance

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "examples"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
PAGE = (ROOT / "docs" / "examples.md").read_text()
SECTIONS = {text.splitlines()[0]: text for text in PAGE.split("\n## ")[1:-1]}
COMMAND = re.compile(
    r"`python -m hpdm_core\.plugins (check (\w+) --plugin (docs/examples/\w+\.py))` checks it\."
)
CHECKED = {heading: COMMAND.findall(text) for heading, text in SECTIONS.items()}
HEADINGS = {found[0][1]: heading for heading, found in CHECKED.items() if found}
OBSERVERS = {"loss_csv"}
PARTS = [name for name in FILES if name not in OBSERVERS]
LINES = {"plain_processes": 70}
"""Lines that are not blank; 25 where nothing else is said."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def part_of(name: str) -> tuple[str, str]:
    """The family and the key of the one part that the example ``name`` registers."""
    (info,) = (info for info in build_plugins([str(FILES[name])]).infos if info.name == name)
    ((family, key),) = (each.split("/") for each in info.keys)
    return family, key


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study of the page as a file, the examples beside it, and a folder for losses in the environment."""
    shutil.copytree(FOLDER, tmp_path / "docs" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (text,) = blocks(PAGE, "yaml")
    file = tmp_path / "examples.yaml"
    file.write_text(text)
    monkeypatch.setenv("HPDM_LOSSES", str(tmp_path / "losses"))
    monkeypatch.chdir(tmp_path)
    return file


def losses(folder: Path) -> list[list[float]]:
    with (folder / "losses" / "examples-default-0.csv").open(newline="") as file:
        return [[float(value) for value in row] for row in csv.reader(file)]


@pytest.mark.parametrize("name", PARTS)
def test_every_check_of_its_family_passes(name: str) -> None:
    family, key = part_of(name)
    checks = run_conformance(build_plugins([str(FILES[name])]), family, key)
    assert len(checks) > 2
    assert [(check, error) for check, error in checks if error is not None or "skipped" in check] == []


def test_each_family_has_one_example() -> None:
    families = [part_of(name)[0] for name in PARTS]
    assert len(families) == len(set(families))
    assert set(FAMILIES) - set(families) == {
        "context_fusions",  # docs/my_fusion.py
        "feature_extractors",
        "optimizers",
        "video_readers",
    }


def test_the_page_shows_every_file_whole_and_in_order() -> None:
    shown = [
        (name, file, code)
        for found, code in zip(CHECKED.values(), blocks(PAGE, "python"), strict=True)
        for _, name, file in found
    ]
    assert [file for _, file, _ in shown] == [f"docs/examples/{name}.py" for name, _, _ in shown]
    assert sorted(name for name, _, _ in shown) == list(FILES)
    assert [name for name, _, code in shown if code != FILES[name].read_text()] == []
    assert all(blocks(SECTIONS[HEADINGS[name]], "python") == [code] for name, _, code in shown)


@pytest.mark.parametrize("name", ["late_levels", *OBSERVERS])
def test_the_command_of_the_page_checks_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((command, key, _),) = CHECKED[HEADINGS[name]]
    monkeypatch.chdir(ROOT)
    assert plugins_command(command.split()) == 0
    shown = capsys.readouterr().out
    assert f"{key}: registration ok" in shown
    assert "all checks passed" in shown


@pytest.mark.parametrize("name", PARTS)
def test_the_page_says_how_a_study_file_names_it(name: str) -> None:
    family, key = part_of(name)
    (snippet,) = re.findall(r"names it\s+with\s+`([^`]+)`", SECTIONS[HEADINGS[name]])
    found: Any = yaml.safe_load(snippet)
    for step in FAMILIES[family].path.split("."):
        found = found[0] if step == "*" else found[step]
    assert (found["use"] if isinstance(found, dict) else found) == key == name


@pytest.mark.parametrize("name", FILES)
def test_it_is_short(name: str) -> None:
    lines = [line for line in FILES[name].read_text().splitlines() if line.strip()]
    assert len(lines) <= LINES.get(name, 25)


def test_the_observer_writes_every_loss_of_the_training_log(study: Path) -> None:
    cell = cells_of(
        load_study(study, sets=["evaluation.metrics=[]", "runtime.log_every=1"]), study.parent / "store"
    )[0][0]
    cell.run()
    (log,) = cell.train_stage.folder.glob("attempts/1/metrics.jsonl")
    logged = [row for line in log.read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert len(logged) == 20
    assert losses(study.parent) == [[row["step"], *row["loss"]] for row in logged]
    assert cell.results()["train"]["observer_errors"] == []


def test_the_study_of_the_page_uses_every_example(study: Path) -> None:
    (command,) = blocks(PAGE, "sh")
    assert command.strip() == "HPDM_LOSSES=losses python -m hpdm_core.study examples.yaml"
    assert study_command([study.name]) == 0
    document = yaml.safe_load(study.read_text())
    assert sorted(document["plugins"]) == [f"docs/examples/{name}.py" for name in FILES]
    spec = json.dumps(document)
    assert [name for name in PARTS if f'"{name}"' not in spec] == []
    assert [len(row) for row in losses(study.parent)] == [3] * 20  # written by the process of the cell
    assert list(study.parent.glob("results/examples/jobs/*/*/worker.json"))
    table = (study.parent / "results" / "examples" / "report" / "table.md").read_text()
    for metric in ("mean", "mean.real", "drift", "drift.real"):
        assert f"## brightness.{metric}\n" in table
