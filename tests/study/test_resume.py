"""kill -9 and Ctrl-C at any moment, then the same command: the same bits."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.files import read_json
from hpdm_core.store.lease import Process

# An observer that shoots its own process once, at a moment of its choice.
ASSASSIN = """
import os, signal
from pathlib import Path
from hpdm_core import hookimpl

def shoot(moment):
    mark = Path({folder!r}) / moment
    if moment in {moments!r} and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.{signal})

@hookimpl
def after_step_finished(cell, step, loss):
    shoot(f"step {{step}}")

@hookimpl
def after_checkpoint_saved(cell, path):
    shoot(f"checkpoint {{path.name}}")

@hookimpl
def after_level_sampled(cell, level, videos):
    shoot(f"level {{level}}")
"""


def command(file: Path, results: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "hpdm_core.study", str(file), "--results", str(results), *flags]


def run(file: Path, results: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(file, results, *flags), capture_output=True, text=True, check=False)


def start(file: Path, results: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Start the command; what it prints goes to a file, since its workers would keep a pipe open."""
    results.mkdir(exist_ok=True)
    with (results / "shown.txt").open("ab") as output:
        return subprocess.Popen(command(file, results, *flags), stdout=output, stderr=output)


def wait_for_worker(study: "subprocess.Popen[bytes]", results: Path) -> None:
    """Wait until a worker of ``study`` lives and has said so, or the study has ended."""
    deadline = time.monotonic() + 120
    while study.poll() is None and not living_workers(results):
        assert time.monotonic() < deadline, shown(results)
        time.sleep(0.02)


def living_workers(results: Path) -> list[Process]:
    """Return the workers that live, without their launchers."""
    found = [Process.read(read_json(path)) for path in (results / "tiny" / "jobs").glob("*/*/worker.json")]
    return [process for process in found if process is not None and process.alive()]


def shown(results: Path) -> str:
    return (results / "shown.txt").read_text()


def assassin(folder: Path, *moments: str, sent: str = "SIGKILL") -> str:
    path = folder / "assassin.py"
    path.write_text(ASSASSIN.format(folder=str(folder), moments=moments, signal=sent))
    return str(path)


def workers(results: Path) -> list[Process]:
    """Return the living workers and launchers of the study."""
    found = []
    for path in (results / "tiny" / "jobs").glob("*/*/*.json"):
        with contextlib.suppress(OSError, ValueError):
            data = json.loads(path.read_text())
            found.append(Process.read(data.get("launcher", data)))
    return [process for process in found if process is not None and process.alive()]


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    """A results folder; workers that a test leaves behind are ended."""
    folder = tmp_path / "results"
    yield folder
    for process in workers(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


Computed = Callable[[Path], dict[str, Any]]


def test_killed_in_training_and_sampling_it_ends_with_the_same_bits(
    tiny: Path, results: Path, undisturbed: Path, computed: Computed
) -> None:
    # Inline, so that worker and controller die at once; the third command is the first to end by itself.
    plugin = assassin(tiny.parent, "step 3", "level 1")
    ends = [run(tiny, results, "--backend", "inline", "--plugin", plugin) for _ in range(3)]
    assert [end.returncode for end in ends] == [-signal.SIGKILL, -signal.SIGKILL, 0], ends[-1].stderr
    assert computed(results) == computed(undisturbed)
    attempts = list((results / "store" / "train").glob("*/attempts/*"))
    assert len(attempts) == 2
    train = json.loads(next((results / "store" / "train").glob("*/result.json")).read_text())
    assert train["resumed_from"] == [2]  # the checkpoint before the shot


def test_a_worker_outlives_its_controller_and_is_adopted(
    tiny: Path, results: Path, undisturbed: Path, computed: Computed
) -> None:
    controller = start(tiny, results)
    wait_for_worker(controller, results)
    controller.kill()
    controller.wait()
    assert workers(results)
    again = run(tiny, results)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "adopted" in again.stdout
    assert computed(results) == computed(undisturbed)
    assert all(
        path.name == "1" for path in (results / "store").glob("*/*/attempts/*")
    )  # one worker did it all


def test_ctrl_c_ends_the_worker_and_says_how_to_go_on(tiny: Path, results: Path) -> None:
    flags = ["--set", "training.steps=100000"]
    study = start(tiny, results, *flags)
    deadline = time.monotonic() + 120
    while not list((results / "store" / "train").glob("*/attempts/1/checkpoints/*/state.json")):
        assert study.poll() is None and time.monotonic() < deadline, shown(results)
        time.sleep(0.05)
    study.send_signal(signal.SIGINT)
    assert study.wait(timeout=60) == 130, shown(results)
    assert f"python -m hpdm_core.study {tiny}" in shown(results) and "training.steps=100000" in shown(results)
    assert "Traceback" not in shown(results)
    assert workers(results) == []
    stage = next((results / "store" / "train").iterdir())
    assert not (stage / "lease.json").exists() and not (stage / "attempts" / "1" / "error.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment_it_ends_with_the_same_bits(
    tiny: Path, results: Path, undisturbed: Path, computed: Computed, seed: int
) -> None:
    dice = random.Random(seed)
    # Both kinds of process, at moments spread over the whole run: imports, training, checkpoints, sampling.
    for _ in range(3):
        study = start(tiny, results)
        if dice.random() < 0.8:
            wait_for_worker(study, results)
        time.sleep(dice.uniform(0.0, 8.0))
        victims = workers(results)
        if dice.random() < 0.7:
            for process in dice.sample(victims, k=min(len(victims), dice.randint(1, 2))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        if dice.random() < 0.7:
            study.kill()
        study.wait()
    end = run(tiny, results)
    assert end.returncode == 0, end.stdout + end.stderr
    assert computed(results) == computed(undisturbed)
