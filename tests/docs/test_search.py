"""docs/search.md is true: its study runs, its tables name what there is."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_core.config.search import PRUNERS, SAMPLERS, SearchKeys, Watching
from hpdm_core.study.plan.study_file import load_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "search.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def table(heading):
    part = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {row.split("|")[1].strip(" `"): row.split("|")[2] for row in part.splitlines() if row[:3] == "| `"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The page's study, run by the page's command."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "tuned.yaml").write_text(blocks("yaml")[0])
    (command,) = blocks("sh")
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "results" / "simulated" / "tuned", done.stdout


def test_the_pages_study_is_searched_and_compared(ran):
    folder, _ = ran
    search = json.loads((folder / "search.json").read_text())
    for proposals in search["arms"].values():
        states = [each["state"] for each in proposals]
        assert len(states) == 12 and set(states) <= {"done", "pruned"}
        best = min(each["objectives"][0] for each in proposals if each["objectives"])
        assert best < 0.4  # 0.1 is the best there is, and the space goes up to 2.6
    assert any(each["state"] == "pruned" for each in search["arms"]["default"])
    lines = (folder / "index.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [
        ["default", "0"],
        ["default", "1"],
        ["no_context", "0"],
        ["no_context", "1"],
    ]
    assert all(line.endswith(",done") for line in lines)


def test_the_report_says_what_the_page_says(ran):
    folder, text = ran
    assert "SIMULATED: every number is made up" in text
    report = (folder / "report" / "table.md").read_text()
    assert "## Search: the best proposal of each arm" in report
    assert "run with seeds 0, 1, none of which the search used." in report


def test_the_tables_name_what_there_is():
    assert list(table("sampler")) == list(SAMPLERS) and list(table("pruner")) == list(PRUNERS)
    assert list(table("key")) == list(SearchKeys.model_fields)
    for heading, parts in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        for name, shown in table(heading).items():
            own = set(parts[name].model_fields) - set(Watching.model_fields)
            assert own <= set(re.findall(r"`(\w+)`", shown)), name


def test_a_dry_run_says_what_the_search_adds(tmp_path):
    from hpdm_core.study.show.dry_run import describe_study

    study = load_study(ROOT / "studies" / "search_example.yaml")
    said = describe_study(study, tmp_path)
    assert "search: before that, 8 proposals of each arm with 1 seeds, 16 cells at most" in said
    assert list(tmp_path.iterdir()) == []


def test_the_example_is_a_search_of_equal_arms():
    study = load_study(ROOT / "studies" / "search_example.yaml")
    assert study.search is not None and study.search.budget == 8
    assert set(study.seeds).isdisjoint(study.search.seeds)
