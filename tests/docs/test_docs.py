"""The documentation is true: links resolve, tables equal signatures, the tutorial's file and commands run."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from hpdm_core import hookspecs
from hpdm_core.base.randomness import generator
from hpdm_core.plugins import FAMILIES, build_plugins
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "writing-a-plugin.md").read_text()
PAGES = sorted([*DOCS.glob("**/*.md"), *ROOT.glob("*.md")])
SMALL = ["training.steps=2", "evaluation.samples=1", "evaluation.reals=2", "evaluation.metrics=[throughput]"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture
def folder(tmp_path):
    """A folder outside the repository with the tutorial's file and the studies beside it."""
    (tmp_path / "my_fusion.py").write_text(blocks(TUTORIAL, "python")[0])
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    return tmp_path


def run(command, folder, *more):
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), str(folder)])
    return subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            broken.append(target)
    assert broken == []


def rows(text):
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]
    return {row[0].strip("`| "): row[1:] for row in cells}


def test_the_hook_table_equals_the_signatures():
    table = rows((DOCS / "hooks.md").read_text())
    hooks = {name: value for name, value in vars(hookspecs).items() if hasattr(value, "hpdm_spec")}
    assert list(table) == list(hooks)
    plugins = build_plugins()
    for family in FAMILIES.values():
        path, factory, keys = table[family.hook]
        assert path == f"`{family.path}`"
        assert factory.strip("`") in " ".join(hooks[family.hook].__doc__.split())
        handed = re.findall(r"(\w+): ", factory)
        assert tuple(handed) == family.positional
        assert re.findall(r"`(\w+)`", keys) == plugins.keys(family.name)
    for name, hook in hooks.items():
        if not name.startswith("register_"):
            arguments = re.findall(r"`(\w+)`", table[name][0])
            assert arguments == list(inspect.signature(hook).parameters)


def test_the_tutorial_shows_the_file():
    code = (DOCS / "my_fusion.py").read_text()
    assert blocks(TUTORIAL, "python")[0] == code
    assert len(code.splitlines()) <= 25
    imports = [line for line in code.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import torch", "from hpdm_core import ContextFusion, hookimpl"]


def test_the_check_commands_pass(folder):
    commands = [text.strip() for text in blocks(TUTORIAL, "sh") if ".plugins check" in text]
    assert len(commands) == 2
    for command in commands:
        done = run(command, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "all checks passed" in done.stdout


def test_the_study_command_makes_a_row(folder):
    (command,) = (text.strip() for text in blocks(TUTORIAL, "sh") if "hpdm_core.study" in text)
    small = [word for each in SMALL for word in ("--set", each)]
    done = run(command, folder, "--only", "mine", "--backend", "inline", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = list((folder / "results").glob("quickstart/report/table.md"))
    assert len(tables) == 1
    assert "mine" in tables[0].read_text()


def test_the_study_file_resolves(folder):
    (study,) = blocks(TUTORIAL, "yaml")
    assert set(yaml.safe_load(study)["arms"]) == {"default", "gentle"}
    (folder / "mine.yaml").write_text(study)
    done = run("python -m hpdm_core.study mine.yaml --dry-run", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gentle" in done.stdout


def test_the_inherited_cases_pass(folder):
    (folder / "test_mine.py").write_text(blocks(TUTORIAL, "python")[1])
    done = run("python -m pytest -q -p no:cacheprovider test_mine.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout


def test_the_dataset_with_a_path_passes_its_check_and_follows_its_content(tmp_path):
    (code,) = blocks((DOCS / "hooks.md").read_text(), "python")
    (tmp_path / "mine.py").write_text(code)
    for split in ("train", "held_out"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(5):
            clip = torch.rand(3, 4, 16, 24, generator=generator(split, number)) * 2 - 1
            torch.save(clip, tmp_path / "data" / split / f"{number}.pt")
    check = "python -m hpdm_core.plugins check saved_clips --plugin mine.py --option root="
    done = run(check + "data", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout
    (tmp_path / "mine.py").write_text(code.replace("Annotated[Path, Content()]", "Path"))
    done = run(check + "data", tmp_path)
    assert done.returncode == 1
    assert "option root would be part of the key" in " ".join((done.stdout + done.stderr).split())


def test_every_word_of_the_glossary_is_said_once():
    words = re.findall(r"^\| (\w+) \|", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    assert len(words) == len(set(words)) > 20


def test_the_arms_that_start_from_another_are_a_study(tmp_path):
    page = (ROOT / "docs" / "small-models.md").read_text()
    block = page.split("So can an arm:\n\n")[1].split("\n\nParameters")[0]
    file = tmp_path / "started.yaml"
    file.write_text("extends: small_clips\n" + textwrap.dedent(block))
    cell = cells_of(load_study(file, only=["default"]), tmp_path / "store")[0][0]
    assert [step.name for step in cell.missing()][:2] == ["train level_0", "train"]
