"""A study on a real SLURM: the same numbers as in this process, and jobs may be ended at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.errors import InputError, report_errors
from hpdm_core.study.__main__ import main

pytestmark = pytest.mark.slurm

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
runtime: {threads: 1, sample_batch: 2, checkpoint_every: 1, log_every: 1}
arms:
  default: {}
  no_context: {model.context_fusion: none}
seeds: [0]
"""

# An observer that stops the worker at the second step, until the file "hold" is gone.
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


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the study computes in this process."""
    folder = tmp_path_factory.mktemp("inline")
    (folder / "tiny.yaml").write_text(STUDY)
    results = folder / "results"
    assert main([str(folder / "tiny.yaml"), "--results", str(results), "--backend", "inline"]) == 0
    return computed(results)


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Path]:
    """The study's file and its results folder."""
    (tmp_path / "tiny.yaml").write_text(STUDY)
    return tmp_path / "tiny.yaml", tmp_path / "results"


def computed(results: Path) -> dict[str, Any]:
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


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def jobs(results: Path) -> list[str]:
    """Return the numbers of the jobs that were submitted last, one per cell."""
    return [json.loads(path.read_text())["slurm"] for path in (results / "tiny" / "jobs").glob("*/job.json")]


def test_the_numbers_are_those_of_this_process_and_nothing_is_done_twice(
    cluster: Path, study: tuple[Path, Path], inline: dict[str, Any]
) -> None:
    file, results = study
    command = [str(file), "--results", str(results), "--backend", "slurm"]
    assert main(command) == 0
    assert len(inline) == 2 * (1 + 2 + 1 + 2)  # per arm: weights, 2 videos, training losses, 2 metrics
    assert computed(results) == inline
    submitted = jobs(results)
    assert len(set(submitted)) == 2
    workers = {path: path.read_text() for path in (results / "tiny" / "jobs").glob("*/worker.json")}
    assert len({json.loads(text)["pid"] for text in workers.values()} | {os.getpid()}) == 3
    attempts = set((results / "store").glob("*/*/attempts/*"))

    assert main(command) == 0
    assert set((results / "store").glob("*/*/attempts/*")) == attempts
    assert {path: path.read_text() for path in workers} == workers and jobs(results) == submitted
    assert queue() == ""


class Held:
    """The study's command in a process of its own, its one cell stopped after the first checkpoint."""

    def __init__(self, file: Path, results: Path) -> None:
        self.results = results
        self.hold, held = file.with_name("hold"), file.with_name("held")
        self.hold.touch()
        plugin = file.with_name("hold.py")
        plugin.write_text(HOLD.format(hold=str(self.hold), held=str(held)))
        self.arguments = [str(file), "--results", str(results), "--backend", "slurm"]
        self.arguments += ["--only", "default", "--plugin", str(plugin)]
        self.shown = file.with_name("shown.txt")
        with self.shown.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hpdm_core.study", *self.arguments], stdout=output, stderr=output
            )
        deadline = time.monotonic() + 120
        while not held.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.shown.read_text()
            time.sleep(0.05)

    def worker(self) -> int:
        (path,) = (self.results / "tiny" / "jobs").glob("*/worker.json")
        return int(json.loads(path.read_text())["pid"])

    def again(self, capsys: pytest.CaptureFixture[str]) -> str:
        """Let cells pass from now on, give the same command, and return what it showed."""
        self.hold.unlink()
        capsys.readouterr()
        assert main(self.arguments) == 0
        return capsys.readouterr().out

    def training(self) -> dict[str, Any]:
        (path,) = (self.results / "store" / "train").glob("*/result.json")
        result: dict[str, Any] = json.loads(path.read_text())
        return result


@pytest.fixture
def held(cluster: Path, study: tuple[Path, Path]) -> Iterator[Held]:
    """A study whose one cell is stopped in the middle of its training."""
    made = Held(*study)
    yield made
    made.hold.unlink(missing_ok=True)
    if made.process.poll() is None:
        made.process.kill()
    made.process.wait()


def of_default(inline: dict[str, Any], results: Path) -> dict[str, Any]:
    """Return the part of ``inline`` that the arm "default" computed, by the keys in the study's index."""
    index = (results / "tiny" / "index.csv").read_text().splitlines()
    (row,) = [line.split(",") for line in index if line.startswith("default,")]
    keys = {row[2], row[3], *row[4].split(";")}
    return {path: value for path, value in inline.items() if path.split("/")[1] in keys}


@pytest.mark.parametrize("way", ["scancel", "kill"])
def test_an_ended_job_counts_as_interrupted_and_goes_on_with_the_same_command(
    held: Held, inline: dict[str, Any], capsys: pytest.CaptureFixture[str], way: str
) -> None:
    (number,) = jobs(held.results)
    if way == "scancel":
        subprocess.run(["scancel", number], check=True)
    else:
        os.kill(held.worker(), signal.SIGKILL)
    assert held.process.wait(timeout=60) == 1
    shown = held.shown.read_text()
    assert "interrupted: default, seed 0" in shown and "failed" not in shown
    held.again(capsys)
    assert jobs(held.results) != [number]
    assert held.training()["resumed_from"] == [1]
    assert computed(held.results) == of_default(inline, held.results)


def test_a_job_outlives_its_controller_and_is_adopted(
    held: Held, inline: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = jobs(held.results)
    held.process.kill()
    held.process.wait()
    assert "adopted" in held.again(capsys)
    assert jobs(held.results) == numbers
    assert held.training()["resumed_from"] == []
    assert computed(held.results) == of_default(inline, held.results)


def test_ctrl_c_takes_the_job_out_of_the_queue(held: Held) -> None:
    held.process.send_signal(signal.SIGINT)
    assert held.process.wait(timeout=60) == 130
    assert queue() == ""


def test_where_no_controller_answers_the_study_is_refused(
    cluster: Path,
    study: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, results = study
    lines = cluster.read_text().splitlines()
    deaf = ["SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line for line in lines]
    (file.parent / "slurm.conf").write_text("\n".join([*deaf, "MessageTimeout=2"]) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(file.parent / "slurm.conf"))
    command = [str(file), "--results", str(results), "--backend", "slurm"]
    with pytest.raises(InputError, match=r"backend: 'slurm' finds no controller: sinfo says: .+"):
        main(command)
    assert report_errors(main, command) == InputError.exit_code == 2
    assert not results.exists()
