"""A cell's stages in several processes, started by torchrun: the same numbers as in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.cell import Cell
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from tests.small import MODEL

TINY = (
    "name: tiny"
    + MODEL
    + """data: {dataset: synthetic}
training: {steps: 4, batch: 2, learning_rate: 1e-3}
sampling: {solver: {use: edm, steps: [2]}}
evaluation: {samples: 20, reals: 40, metrics: [
   {use: held_out_loss, patches: 40}, {use: frechet, extractor: statistics}, throughput]}
runtime: {threads: 1, sample_batch: 3, checkpoint_every: 2, log_every: 1, precision: fp64}
arms:
  default: {training.start_from: {arm: base}}
  base: {training.steps: 3}
"""
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(TINY)
    return path


def cell_of(file: Path, results: Path) -> Cell:
    return cells_of(load_study(file), results / "store")[0][0]


@pytest.fixture(scope="module")
def alone(file: Path) -> Path:
    """The results of one process."""
    results = file.parent / "alone"
    cell_of(file, results).run()
    return results


def torchrun(processes: int, *arguments: str, timeout: float = 240) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run(
        [*launcher, "-m", "hpdm_core.study.together", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(store: Path) -> dict[str, Any]:
    """Samples as bytes, and the rows of metrics."""
    found: dict[str, Any] = {
        str(path.relative_to(store)): path.read_bytes() for path in store.glob("samples/*/*.safetensors")
    }
    for path in store.glob("evaluations/*/result.json"):
        result = json.loads(path.read_text())
        found[str(path.relative_to(store))] = (result["rows"], result["protocol"])
    return found


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_and_metrics_do_not_depend_on_the_number_of_processes(
    file: Path, alone: Path, tmp_path: Path, processes: int
) -> None:
    shutil.copytree(alone / "store" / "train", tmp_path / "store" / "train")
    shown = torchrun(processes, str(file), "--results", str(tmp_path), "--only", "default")
    got, expected = numbers(tmp_path / "store"), numbers(alone / "store")
    assert len(expected) == 20 + 3
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == value, name
    assert shown.splitlines().count("default, seed 0: done") == 1
    # One process claimed each stage, and one wrote its result.
    assert [path.name for path in (tmp_path / "store").glob("*/*/attempts/*")] == ["1"] * 6
    assert not list((tmp_path / "store").rglob("lease.json"))
    assert cell_of(file, tmp_path).missing() == []


def test_a_whole_cell_in_two_processes(file: Path, alone: Path, tmp_path: Path) -> None:
    """The model that it starts from is trained first, by both."""
    whole = ("--only", "default", "--set", "runtime.strategy=fsdp")
    torchrun(2, str(file), "--results", str(tmp_path), *whole)
    cell = cell_of(file, tmp_path)
    assert cell.missing() == []
    mine, theirs = cell.results(), cell_of(file, alone).results()
    for what in ("train", "taken", "new"):
        assert mine["train"]["started_from"][what] == theirs["train"]["started_from"][what]
    assert cell.base is not None and cell.base.keys.train == mine["train"]["started_from"]["train"]
    started = cell.base.train_stage.result()
    assert started is not None and started["processes"] == 2 and started["attempts"] == 1
    assert mine["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-9)
    for row, other in zip(
        mine["evaluate held_out_loss"]["rows"], theirs["evaluate held_out_loss"]["rows"], strict=True
    ):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4)
