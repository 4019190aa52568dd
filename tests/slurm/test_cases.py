"""What happens to jobs on a cluster, one after the other, on a real one: each is classified, and handled."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.study.__main__ import main

pytestmark = pytest.mark.slurm

Hold = Callable[..., Any]
Computed = Callable[[Path], dict[str, Any]]


def states(results: Path) -> set[str]:
    rows = (results / "tiny" / "index.csv").read_text().splitlines()[1:]
    return {row.rpartition(",")[2] for row in rows}


def outcomes(results: Path) -> list[dict[str, Any]]:
    paths = sorted((results / "tiny" / "jobs").glob("*/*/outcome.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_24_cells_complete_through_arrays(cluster: Any, study: tuple[Path, Path], numbers: Any) -> None:
    file, results = study
    few = ["--set", "evaluation.metrics=[held_out_loss]", "--set", f"seeds={list(range(12))}"]
    assert main([str(file), "--results", str(results), *few, "--max-parallel", "24"]) == 0
    assert states(results) == {"done"}
    made = numbers(results)
    assert len(made) == len(set(made)) == 24
    # No array may have more than 16 elements here, and no cell its own.
    arrays = [number.partition("_")[0] for number in made]
    assert sorted(arrays.count(array) for array in set(arrays)) == [8, 16]


@pytest.mark.parametrize(("way", "accounting"), [("requeue", True), ("USR2", True), ("USR2", False)], ids=str)
def test_a_preempted_cell_goes_on_at_the_exact_step(
    cluster: Any,
    hold: Hold,
    of_default: Computed,
    computed: Computed,
    numbers: Any,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    accounting: bool,
) -> None:
    if not accounting:
        monkeypatch.setenv("SLURM_CONF", str(cluster.config_without_accounting))
        assert subprocess.run(["sacct"], capture_output=True, check=False).returncode
    held = hold()
    number = held.number
    if way == "requeue":
        subprocess.run(["scontrol", "requeue", number], check=True)
    else:
        subprocess.run(["scancel", "--signal=USR2", number], check=True)
    time.sleep(2)  # the signal travels; SLURM gives a job five seconds here
    held.let_go()
    assert held.end() == 0, held.text
    # No checkpoint is due at step 2: this one was written because of the signal.
    assert held.training()["resumed_from"] == [2]
    assert computed(held.results) == of_default(held.results)
    assert numbers(held.results) == [number]


def test_a_cell_out_of_memory_is_tried_again_with_smaller_micro_batches(
    cluster: Any, study: tuple[Path, Path], of_default: Computed, computed: Computed, tmp_path: Path
) -> None:
    file, results = study
    plugin = tmp_path / "greedy.py"
    plugin.write_text(
        "import time\nfrom pathlib import Path\nfrom hpdm_core import hookimpl\n"
        f"mark = Path({str(tmp_path / 'grew')!r})\n"
        "@hookimpl\ndef after_step_finished(cell, step, loss):\n"
        "    if mark.exists():\n        return\n"
        "    mark.touch()\n    kept = []\n"
        "    while True:\n        kept.append(bytearray(100 << 20))\n        time.sleep(0.2)\n"
    )
    command = [str(file), "--results", str(results), "--only", "default", "--plugin", str(plugin)]
    assert main([*command, "--set", "backend.mem_gb=1.5"]) == 0
    first, second = outcomes(results)
    assert (first["state"], first["cause"]) == ("failed", "out of memory")
    assert (second["state"], second["smaller"]) == ("done", {"micro_batch": 1})
    (result,) = (results / "store" / "train").glob("*/result.json")
    assert json.loads(result.read_text())["steps"] == 3


def test_a_cell_whose_node_is_lost_goes_on_elsewhere(
    cluster: Any, hold: Hold, of_default: Computed, computed: Computed
) -> None:
    held = hold("--set", "runtime.checkpoint_every=1")
    node = cluster.run("squeue", "--noheader", "--format=%N").strip()
    try:
        cluster.lose_node(node)
        held.let_go()
        assert held.end(seconds=180) == 0, held.text
    finally:
        cluster.start_node(node)
    assert held.training()["resumed_from"] == [1]
    assert computed(held.results) == of_default(held.results)


def test_a_cell_over_its_time_limit_goes_on_while_it_advances_and_only_then(
    cluster: Any,
    study: tuple[Path, Path],
    of_default: Computed,
    computed: Computed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, results = study
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import time\nfrom hpdm_core import hookimpl\n"
        "@hookimpl\ndef after_step_finished(cell, step, loss):\n"
        "    time.sleep(25 if cell.arm == 'default' else 300)\n"
    )
    command = [str(file), "--results", str(results), "--plugin", str(plugin)]
    assert main([*command, "--set", "backend.time=1"]) == 1
    shown = capsys.readouterr().out
    assert "failed: no_context, seed 0" in shown and "backend.time" in shown
    assert sorted(str(each["cause"]) for each in outcomes(results)) == ["None", "time limit"]
    (train,) = (results / "store" / "train").glob("*/result.json")
    resumed = json.loads(train.read_text())["resumed_from"]
    assert resumed and resumed == sorted(set(resumed))
    assert computed(results) == of_default(results)


def test_a_controller_killed_at_random_moments_loses_nothing_and_starts_nothing_twice(
    cluster: Any, study: tuple[Path, Path], numbers: Any
) -> None:
    file, results = study
    few = ["--set", "evaluation.metrics=[held_out_loss]", "--set", "seeds=[0, 1, 2]"]
    command = [sys.executable, "-m", "hpdm_core.study", str(file), "--results", str(results), *few]
    accounts = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID")
    before = cluster.run(*accounts).split()
    dice = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Importing and planning take a few seconds: some kills fall around the submission.
        time.sleep(dice.uniform(3.0, 9.0))
        process.kill()
        process.wait()
    assert main(command[3:]) == 0
    assert states(results) == {"done"}
    trained = list((results / "store" / "train").glob("*/attempts/*"))
    assert len(trained) == 6  # each model once
    assert set(cluster.run(*accounts).split()) - set(before) >= set(numbers(results))
    ran = list((results / "tiny" / "jobs").glob("*/*/worker.json"))
    assert len(ran) == 6


def test_a_cell_on_two_nodes(
    cluster: Any, study: tuple[Path, Path], of_default: Computed, computed: Computed
) -> None:
    file, results = study
    command = [str(file), "--results", str(results), "--only", "default"]
    assert main([*command, "--set", "backend.nodes=2", "--set", "runtime.strategy=ddp"]) == 0
    (log,) = (results / "tiny" / "slurm").glob("*/*_0_log.out")
    nodes = [path.name for path in log.parent.glob("*_log.out")]
    assert len(nodes) == 2, nodes
    made, alone = computed(results), of_default(results)
    assert made.keys() == alone.keys()
    (losses,) = (path for path in made if path.startswith("train") and path.endswith("result.json"))
    assert made[losses] == pytest.approx(alone[losses], rel=1e-4)


def test_submit_leave_look_and_come_back(
    cluster: Any, study: tuple[Path, Path], inline: dict[str, Any], computed: Computed, capsys: Any
) -> None:
    file, results = study
    command = [str(file), "--results", str(results)]
    assert main([*command, "--detach"]) == 0
    assert "submitted: 2 cells are queued or running" in capsys.readouterr().out
    deadline = time.monotonic() + 120
    while True:
        assert main([*command, "--status"]) == 0
        shown = capsys.readouterr().out
        assert "no controller is at work" in shown
        if "2 of 2 cells done" in shown:
            break
        assert re.search(r"\d (running|queued)", shown), shown
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    assert main(command) == 0
    assert computed(results) == inline


def test_cancel_ends_what_was_left_alone(hold: Hold, capsys: pytest.CaptureFixture[str]) -> None:
    held = hold()
    held.process.kill()  # the laptop is closed
    held.process.wait()
    assert main([*held.arguments, "--cancel"]) == 0
    assert "1 jobs cancelled" in capsys.readouterr().out
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout == b""
    assert main([*held.arguments, "--status"]) == 0
    assert "cancelled" in capsys.readouterr().out
    held.again(capsys)


def test_cancel_asks_a_controller_that_is_at_work(hold: Hold, capsys: pytest.CaptureFixture[str]) -> None:
    held = hold()
    assert main([*held.arguments, "--cancel"]) == 0
    assert held.end() == 1
    assert "cancelled on request" in held.text
    assert f"process {held.process.pid} on" in capsys.readouterr().out
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout == b""


def test_queued_jobs_run_the_code_that_was_there_when_they_were_submitted(
    cluster: Any, study: tuple[Path, Path], tmp_path: Path
) -> None:
    file, results = study
    plugin, said = tmp_path / "edited.py", tmp_path / "said"
    text = (
        "from pathlib import Path\nfrom hpdm_core import hookimpl\n"
        "@hookimpl\ndef before_cell_started(cell):\n"
        f"    import hpdm_core\n    Path({str(said)!r}).write_text('as submitted ' + hpdm_core.__file__)\n"
    )
    plugin.write_text(text)
    command = [str(file), "--results", str(results), "--only", "default", "--plugin", str(plugin)]
    later = ["--set", "backend.additional_parameters={begin: now+5}"]
    assert main([*command, *later, "--detach"]) == 0
    plugin.write_text("raise SystemExit('edited while the job was waiting')\n")
    deadline = time.monotonic() + 90
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    words = said.read_text()
    assert words.startswith("as submitted ") and str(results / "tiny" / "code") in words
    plugin.write_text(text)
    assert main(command) == 0


def test_a_controller_inside_an_allocation_submits_as_one_outside(
    cluster: Any, study: tuple[Path, Path]
) -> None:
    file, results = study
    words = [
        sys.executable,
        "-m",
        "hpdm_core.study",
        str(file),
        "--results",
        str(results),
        "--only",
        "default",
    ]
    inside = ["srun", "--ntasks=1", "--mem=1000", "--cpu-bind=none", *words]
    shown = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=180)
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_a_worker_killed_with_its_controller_away_is_told_by_the_next_command(
    hold: Hold, capsys: pytest.CaptureFixture[str], of_default: Computed, computed: Computed
) -> None:
    held = hold("--set", "runtime.checkpoint_every=1")
    held.process.kill()
    held.process.wait()
    os.kill(held.worker(), signal.SIGKILL)
    time.sleep(3)
    held.again(capsys)
    first, second = outcomes(held.results)
    assert (first["cause"], second["state"]) == ("killed", "done")
    assert computed(held.results) == of_default(held.results)
