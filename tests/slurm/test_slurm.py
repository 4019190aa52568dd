"""A study on a real SLURM: the same numbers as in this process, and jobs may be ended at any moment."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.study.__main__ import main

pytestmark = pytest.mark.slurm

Hold = Callable[..., Any]
Computed = Callable[[Path], dict[str, Any]]


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def test_the_numbers_are_those_of_this_process_and_nothing_is_done_twice(
    cluster: Any, study: tuple[Path, Path], inline: dict[str, Any], computed: Computed, numbers: Any
) -> None:
    file, results = study
    command = [str(file), "--results", str(results)]
    assert main(command) == 0
    assert len(inline) == 2 * (1 + 2 + 1 + 2)  # per arm: weights, 2 videos, training losses, 2 metrics
    assert computed(results) == inline
    submitted = numbers(results)
    assert len(set(submitted)) == 2
    workers = {path: path.read_text() for path in (results / "tiny" / "jobs").glob("*/*/worker.json")}
    assert len({json.loads(text)["pid"] for text in workers.values()} | {os.getpid()}) == 3
    attempts = set((results / "store").glob("*/*/attempts/*"))

    assert main(command) == 0
    assert set((results / "store").glob("*/*/attempts/*")) == attempts
    assert {path: path.read_text() for path in workers} == workers and numbers(results) == submitted
    assert queue() == ""


@pytest.mark.parametrize(("way", "state"), [("scancel", "cancelled"), ("kill", "interrupted")])
def test_an_ended_job_is_not_failed_and_goes_on_with_the_same_command(
    hold: Hold,
    of_default: Computed,
    computed: Computed,
    numbers: Any,
    capsys: pytest.CaptureFixture[str],
    way: str,
    state: str,
) -> None:
    held = hold("--set", "runtime.checkpoint_every=1")
    (number,) = numbers(held.results)
    if way == "scancel":
        subprocess.run(["scancel", number], check=True)
    else:
        os.kill(held.worker(), signal.SIGKILL)
    assert held.end() == 1
    assert f"{state}: default, seed 0" in held.text and "failed" not in held.text
    if way == "kill":
        assert "SIGKILL" in held.text and "    | " in held.text  # its signal, and its last lines
    held.again(capsys)
    assert len(set(numbers(held.results))) == 2
    assert held.training()["resumed_from"] == [1]
    assert computed(held.results) == of_default(held.results)


def test_a_job_outlives_its_controller_and_is_adopted(
    hold: Hold, of_default: Computed, computed: Computed, numbers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    held = hold()
    before = numbers(held.results)
    held.process.kill()
    held.process.wait()
    assert "adopted" in held.again(capsys)
    assert numbers(held.results) == before
    assert held.training()["resumed_from"] == []
    assert computed(held.results) == of_default(held.results)


def test_ctrl_c_takes_the_job_out_of_the_queue(hold: Hold) -> None:
    held = hold()
    held.process.send_signal(signal.SIGINT)
    assert held.end() == 130
    assert queue() == ""


def test_where_no_controller_answers_the_study_is_refused(
    cluster: Any,
    study: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, results = study
    lines = cluster.config.read_text().splitlines()
    deaf = ["SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line for line in lines]
    (file.parent / "slurm.conf").write_text("\n".join([*deaf, "MessageTimeout=2"]) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(file.parent / "slurm.conf"))
    command = [str(file), "--results", str(results)]
    with pytest.raises(InputError, match=r"backend: 'slurm' finds no controller: sinfo says: .+"):
        main(command)
    assert report_errors(main, command) == InputError.exit_code == 2
    assert not results.exists()
