"""docs/metrics.md is true: its table is made from the records, its commands and files are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.evaluation.catalogue import known_records, side_by_side
from hpdm_core.evaluation.command import build_parser
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.plugins import build_plugins

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, ucf: Path, fakes: Path) -> Path:
    """A folder as the page has it."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "ucf101").symlink_to(ucf)
    (tmp_path / "generated").symlink_to(fakes)
    shutil.copy(ROOT / "docs" / "my_protocol.yaml", tmp_path)
    return tmp_path


def run(command: str, folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python"
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    return subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_table_is_that_of_the_records() -> None:
    assert side_by_side(known_records(build_plugins())) in PAGE


def test_its_commands_run(folder: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.strip().splitlines()]
    for command in commands:
        if "stylegan_v" in command:
            continue  # below: it needs weights
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
    first, again = (
        json.loads((folder / name).read_text())["results"][0] for name in ("mine.json", "again.json")
    )
    assert first["value"] == again["value"]
    assert "the records are equal" in done.stdout


def test_a_published_protocol_runs_with_weights_and_says_what_is_missing_without(folder: Path) -> None:
    (command,) = [block.strip() for block in blocks("sh") if "stylegan_v" in block]
    before = sorted(folder.iterdir())
    done = run(command, folder)
    assert done.returncode == 2 and "i3d_torchscript.pt" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(folder.iterdir()) == before
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), folder / "i3d_torchscript.pt")
    small = ("--num-fakes", "2", "--num-reals", "2", "--bootstrap", "0")
    done = run(command, folder, *small, HPDM_WEIGHTS=str(folder))
    assert done.returncode == 0, done.stderr
    assert "quirk of the protocol: generated values are truncated" in done.stdout
    (result,) = json.loads((folder / "fvd.json").read_text())["results"]
    assert result["modified"] == ["reals.count 2048 -> 2", "fakes.count 2048 -> 2"]
    assert result["record"]["reals"]["prepare"]["jpeg_quality"] == 75


def test_its_study_fits_the_papers_levels(tmp_path: Path) -> None:
    text, *others = blocks("yaml")
    for other in others:  # metrics of other sections
        (tmp_path / "study.yaml").write_text(other)
        assert load_cell(tmp_path / "study.yaml").config.evaluation.metrics
    (tmp_path / "study.yaml").write_text(text)
    cell = load_cell(tmp_path / "study.yaml")
    sizes = [cell.pyramid.size(level) for level in range(3)]
    for part, level in zip(cell.config.evaluation.metrics, (0, 2), strict=True):
        fitted = cell.make("metrics", part).fitted(cell.config, cell.plugins, sizes)
        assert (fitted.level, fitted.modified) == (level, ())


def test_every_option_and_protocol_that_it_names_exists() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert named - flags == {"--nproc-per-node", "--evaluate-only"}
    known = {record.name for record in known_records(build_plugins())}
    families = {name.partition("/")[0] for name in known}
    for name in re.findall(r"`(\w+/\w+)`", PAGE):
        assert name in known or name.partition("/")[0] not in families
