"""docs/performance.md and benchmarks/README.md: settings are valid, commands exist, sums are right."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from hpdm_core.assembly.compose import load_cell
from hpdm_core.study.__main__ import build_parser
from hpdm_core.study.plan.study_file import load_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
FIGURES = (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
def test_settings_are_valid_and_of_the_runtime(block, tmp_path):
    given = yaml.safe_load(block)
    runtime = load_cell({"extends": "tiny_clips", **given}).config.runtime
    for name, value in given["runtime"].items():
        assert str(getattr(runtime, name)) == str(value)


def test_study_commands_can_be_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python -m hpdm_core\.study (.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        given = build_parser().parse_args(shlex.split(command))
        assert load_study(given.file, sets=given.sets).configs


@pytest.mark.parametrize("text", [PAGE, FIGURES], ids=["performance", "benchmarks"])
def test_commands_of_benchmarks_have_their_options(text):
    for name, options in re.findall(r"^ *python benchmarks/(\w+)\.py(.*)$", text, flags=re.MULTILINE):
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, f"{name}.py has no {option}"


@pytest.mark.parametrize(
    ("blocks", "allocation", "step", "whole"),
    [(6, [1, 1, 2, 2, 3, 3], 2.8, 2.7), (5, [1, 2, 2, 2, 3], 4.6, 4.1)],
)
def test_what_a_cache_can_gain(blocks, allocation, step, whole):
    """The block runs that the page counts, from the pyramid itself."""
    assembly = load_cell("tiny_clips", sets=[f"model.blocks={blocks}"])
    assert list(assembly.levels_per_block) == allocation
    chains = [assembly.pyramid.chain(2, offset) for offset in assembly.pyramid.tiles(2, ("h", "w"))]
    tiles = len(chains) * sum(count > 2 for count in allocation)
    wanted = max(block for block, count in enumerate(allocation) if count > 2)
    parents = 0
    for level in (0, 1):
        first = sum(count > level for count in allocation)
        second = sum(count > level for count in allocation[:wanted])
        parents += len({chain[: level + 1] for chain in chains}) * (first + second)
    assert (len(chains), len(set(chains))) == (196, 100)
    assert round((tiles + parents) / tiles, 1) == step
    assert round(32 * (tiles + parents) / (32 * tiles + parents), 1) == whole
    assert f"{step}" in PAGE and f"{whole}" in PAGE
