"""The cluster of `cluster.py`, for the tests; and a study that can be stopped in the middle of a cell."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpdm_core.study.__main__ import main

STUDY = """
name: tiny
model:
  {video: [4, 16, 16], patch: [2, 4, 4], token: [1, 2, 2], levels: 2, token_dim: 16, blocks: 2, backbone: {
   use: rin, latent_dim: 16, latents: 4, latent_layers: 1, latent_heads: 2, latent_head_dim: 8, heads: 2,
   latent_mlp_ratio: 2, token_mlp_ratio: 2}}
data: {dataset: synthetic}
training: {steps: 3, batch: 2, learning_rate: 1e-3}
sampling: {solver: {use: edm, steps: [2]}}
evaluation: {samples: 2, reals: 4, metrics: [held_out_loss, {use: frechet, extractor: statistics}]}
runtime: {threads: 1, sample_batch: 2, checkpoint_every: 100, log_every: 1}
backend: {use: slurm, time: 5}
arms:
  default: {}
  no_context: {model.context_fusion: none}
seeds: [0]
"""

# An observer that stops the worker after the second step, until the file "hold" is gone.
HOLD = """
import time
from pathlib import Path
from hpdm_core import hookimpl

@hookimpl
def after_step_finished(cell, step, loss):
    while step == 2 and Path({hold!r}).exists():
        Path({held!r}).touch()
        time.sleep(0.05)
"""


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def slurm() -> Iterator[Any]:
    """Start the cluster; end it after the last test."""
    cluster = _load("cluster")
    stack = cluster.running()
    try:
        made = stack.__enter__()
    except cluster.Missing as error:
        if os.environ.get("HPDM_SLURM") == "required":
            pytest.fail(str(error))
        pytest.skip(str(error))
    except cluster.Broken as error:
        pytest.fail(str(error))
    try:
        yield made
    finally:
        stack.__exit__(None, None, None)


@pytest.fixture
def cluster(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the commands of this test, and what it starts, talk to the cluster."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(slurm.config))
    slurm.wait(slurm.all_idle, seconds=60, what="idle nodes")
    return slurm


@pytest.fixture(scope="session")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the study computes in this process, undisturbed."""
    folder = tmp_path_factory.mktemp("inline")
    (folder / "tiny.yaml").write_text(STUDY)
    results = folder / "results"
    assert main([str(folder / "tiny.yaml"), "--results", str(results), "--backend", "inline"]) == 0
    return computed_in(results)


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Path]:
    """The study's file and its results folder."""
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path / "tiny.yaml", tmp_path / "results"


def computed_in(results: Path) -> dict[str, Any]:
    """Return all that a study computed, by path: weights and samples as bytes, rows and losses as numbers."""
    store = results / "store"
    found: dict[str, Any] = {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*.safetensors")
        if "attempts" not in path.parts
    }
    for kind, figure in (("evaluations", "rows"), ("train", "loss")):
        for path in store.glob(f"{kind}/*/result.json"):
            found[str(path.relative_to(store))] = json.loads(path.read_text())[figure]
    return found


@pytest.fixture
def computed() -> Callable[[Path], dict[str, Any]]:
    return computed_in


def numbers_of(results: Path) -> list[str]:
    """Return the numbers of all jobs that were submitted, by cell and attempt."""
    found = sorted((results / "tiny" / "jobs").glob("*/*/job.json"))
    return [json.loads(path.read_text())["slurm"] for path in found]


class Held:
    """The study's command in a process of its own, its one cell stopped after its second step."""

    def __init__(self, file: Path, results: Path, *flags: str) -> None:
        self.results = results
        self.hold, held = file.with_name("hold"), file.with_name("held")
        self.hold.touch()
        plugin = file.with_name("hold.py")
        plugin.write_text(HOLD.format(hold=str(self.hold), held=str(held)))
        self.arguments = [
            str(file),
            "--results",
            str(results),
            "--only",
            "default",
            "--plugin",
            str(plugin),
            *flags,
        ]
        self.shown = file.with_name("shown.txt")
        self.process = self.start()
        self.wait(held.exists, "a cell that is held")

    def start(self) -> "subprocess.Popen[bytes]":
        with self.shown.open("ab") as output:
            command = [sys.executable, "-m", "hpdm_core.study", *self.arguments]
            return subprocess.Popen(command, stdout=output, stderr=output)

    def wait(self, ready: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            late = time.monotonic() > deadline or self.process.poll() is not None
            assert not late, f"waited in vain for {what}: {self.text}"
            time.sleep(0.05)

    @property
    def text(self) -> str:
        return self.shown.read_text()

    @property
    def number(self) -> str:
        (number,) = numbers_of(self.results)
        return number

    @property
    def folder(self) -> Path:
        """The newest attempt's."""
        return sorted((self.results / "tiny" / "jobs").glob("*/*"))[-1]

    def worker(self) -> int:
        return int(json.loads((self.folder / "worker.json").read_text())["pid"])

    def let_go(self) -> None:
        self.hold.unlink()

    def end(self, *, seconds: float = 120) -> int:
        """Wait for the command to end and return its exit code."""
        return self.process.wait(timeout=seconds)

    def again(self, capsys: pytest.CaptureFixture[str]) -> str:
        """Let cells pass from now on, give the same command, and return what it showed."""
        self.let_go()
        capsys.readouterr()
        assert main(self.arguments) == 0
        return capsys.readouterr().out

    def training(self) -> dict[str, Any]:
        (path,) = (self.results / "store" / "train").glob("*/result.json")
        result: dict[str, Any] = json.loads(path.read_text())
        return result


@pytest.fixture
def hold(cluster: Any, study: tuple[Path, Path]) -> Iterator[Callable[..., Held]]:
    """Return a function that runs the study until its one cell is stopped in the middle of its training."""
    made: list[Held] = []

    def make(*flags: str) -> Held:
        made.append(Held(*study, *flags))
        return made[-1]

    yield make
    for each in made:
        each.hold.unlink(missing_ok=True)
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()
    cluster.empty_queue()


@pytest.fixture
def numbers() -> Callable[[Path], list[str]]:
    return numbers_of


@pytest.fixture
def of_default(inline: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """Return a function that picks what the arm "default" computed, by the keys in the study's index."""

    def pick(results: Path) -> dict[str, Any]:
        index = (results / "tiny" / "index.csv").read_text().splitlines()
        (row,) = [line.split(",") for line in index if line.startswith("default,")]
        keys = {row[2], row[3], *row[4].split(";")}
        return {path: value for path, value in inline.items() if path.split("/")[1] in keys}

    return pick
