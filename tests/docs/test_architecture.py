"""docs/architecture.md: the ways are followed, and what it names exists; and the shape of the packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from hpdm_core.evaluate import main as evaluate
from hpdm_core.study.__main__ import main as study
from tests.architecture import PACKAGES, Source
from tests.small import MODEL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = re.compile(r"`((?:hpdm_core|plugins/hpdm_plugins)/[\w/]+\.py):([\w.]+)`")
LIMITS = {
    "A study file becomes a finished cell": 20,
    "A batch becomes a loss": 9,
    "A tile is sampled": 10,
    "Two folders go through `evaluate`": 10,
}


def way(title: str) -> list[tuple[str, str]]:
    """The steps of a way: file and function."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\d+\. ", line)]
    found = [NAMED.findall(line)[0] for line in lines]
    assert len(found) == len(lines) > 5
    return found


@contextmanager
def traced(steps: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Note each call of a function among ``steps`` while the block lasts, in every thread."""
    wanted = {(str(ROOT / file), name.rpartition(".")[2]): (file, name) for file, name in steps}
    seen: dict[CodeType, tuple[str, str] | None] = {}
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in seen:
            step = wanted.get((code.co_filename, code.co_name))
            seen[code] = step if step is not None and code.co_qualname == step[1] else None
        step = seen[code]
        if step is not None:
            calls.append(step)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def in_order(steps: list[tuple[str, str]], calls: list[tuple[str, str]]) -> bool:
    left = iter(calls)
    return all(step in left for step in steps)


TINY = (
    MODEL
    + """data: {dataset: synthetic}
training: {steps: 3, batch: 2, learning_rate: 1e-3}
sampling: {solver: {use: edm, steps: [2]}}
evaluation: {samples: 2, reals: 2, metrics: [throughput]}
runtime: {threads: 1, prefetch: 0}
"""
)


def test_the_study_the_batch_and_the_tile_take_the_ways_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    names = [title for title in LIMITS if not title.startswith("Two folders")]
    with traced([step for name in names for step in way(name)]) as calls:
        arguments = [
            str(tmp_path / "tiny.yaml"),
            "--results",
            str(tmp_path / "results"),
            "--backend",
            "inline",
        ]
        assert study(arguments) == 0
    for name in names:
        steps = way(name)
        missing = [step for step in steps if step not in calls]
        assert missing == [], name
        assert in_order(steps, calls), (name, [call for call in dict.fromkeys(calls) if call in steps])


def test_two_folders_take_the_way_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    for side in ("real", "fake"):
        (tmp_path / side).mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (1, 16, 16, 16, 3), dtype=np.uint8)
            np.save(tmp_path / side / f"{number}.npy", pixels)
    (tmp_path / "mine.yaml").write_text(
        "{name: mine/small, title: 'frechet[random3d]', source: here, measure: frechet, detector: random3d, frames: 8, "
        "reals: {count: 3, offset: start, short: drop, prepare: {size: as_fakes, resize: bilinear_antialias, crop: "
        "centre}}, fakes: {count: 3}}\n"
    )
    steps = way("Two folders go through `evaluate`")
    with traced(steps) as calls:
        arguments = ["--real", str(tmp_path / "real"), "--fake", str(tmp_path / "fake"), "--no-cache"]
        assert evaluate([*arguments, "--protocol", str(tmp_path / "mine.yaml"), "--bootstrap", "0"]) == 0
    assert [step for step in steps if step not in calls] == []
    assert in_order(steps, calls), list(dict.fromkeys(calls))


@pytest.mark.parametrize("title", LIMITS)
def test_the_ways_are_short(title: str) -> None:
    assert len(way(title)) <= LIMITS[title]


def test_everything_that_the_page_names_exists() -> None:
    names = NAMED.findall(PAGE)
    assert len(names) > 50
    for file, name in names:
        body: list[Any] = ast.parse((ROOT / file).read_text()).body
        for step in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == step]
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])


def test_the_page_lists_the_packages_in_the_order_of_their_layers() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [each["layers"] for each in contracts if each["name"] == "arrows point one way"]
    ranks = {name.strip(): rank for rank, layer in enumerate(layers) for name in layer.split("|")}
    table = PAGE.partition("## Packages")[2].partition("\n## ")[0]
    listed = [
        re.findall(r"`(hpdm_core\.\w+)`", line.split("|")[1]) for line in table.splitlines() if "| `" in line
    ]
    order = [ranks[name] for names in listed[1:] for name in names]  # the first row is the commands
    assert order == sorted(order)
    assert {name for names in listed for name in names} == set(ranks) - {"hpdm_core.__main__"}


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_no_circle_no_crowd(folder: Path) -> None:
    assert Source(folder).faults() == []


def test_the_shape_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.architecture"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "hpdm_core: " in done.stdout


def test_a_circle_a_crowd_and_a_long_constructor_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.architecture.ROOT", tmp_path)
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from pack import two\n")
    (package / "two.py").write_text("def late():\n    import pack.one\n")
    arguments = ", ".join(f"a{number}" for number in range(9))
    (package / "wide.py").write_text(f"class Wide:\n    def __init__(self, {arguments}): ...\n")
    for number in range(12):
        (package / f"more{number}.py").touch()
    circle, crowd, wide = Source(package).faults()
    assert circle.startswith("circle of imports: pack.") and "15 modules" in crowd and "9 constructor" in wide
