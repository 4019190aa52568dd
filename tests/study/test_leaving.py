"""Leaving a study on this machine, looking at it, coming back, ending it; and workers that end in order."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base import interruption
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.store.heartbeat import JobHeartbeat
from hpdm_core.store.lease import Process
from hpdm_core.study.__main__ import main
from hpdm_core.study.worker.run_cell import _cause

# An observer that stops its worker after the third step, until the file "hold" is gone.
HOLD = """
import time
from pathlib import Path
from hpdm_core import hookimpl

@hookimpl
def after_step_finished(cell, step, loss):
    while step == 3 and Path({hold!r}).exists():
        Path({held!r}).touch()
        time.sleep(0.02)
"""


class Left:
    """The tiny study, left alone with one worker that is held after its third step."""

    def __init__(self, tiny: Path) -> None:
        self.hold, self.held = tiny.with_name("hold"), tiny.with_name("held")
        self.hold.touch()
        plugin = tiny.with_name("hold.py")
        plugin.write_text(HOLD.format(hold=str(self.hold), held=str(self.held)))
        self.results = tiny.with_name("results")
        self.folder = self.results / "tiny"
        self.arguments = [str(tiny), "--results", str(self.results), "--plugin", str(plugin)]
        # No checkpoint is due before the last step.
        self.arguments += ["--set", "runtime.checkpoint_every=100"]

    def wait(self, ready: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, (self.folder / "controller.log").read_text()
            time.sleep(0.05)

    def worker(self) -> Process:
        (path,) = self.folder.glob("jobs/*/1/worker.json")
        found = Process.read(read_json(path))
        assert found is not None
        return found

    def controller(self) -> Process | None:
        return Process.read(read_json(self.folder / "controller.lock"))

    def processes(self) -> list[Process]:
        named = [read_json(path) for path in self.folder.glob("jobs/*/*/worker.json")]
        jobs = [(read_json(path) or {}).get("launcher") for path in self.folder.glob("jobs/*/*/job.json")]
        found = [Process.read(data) for data in [*named, *jobs, read_json(self.folder / "controller.lock")]]
        return [process for process in found if process is not None and process.alive()]


@pytest.fixture
def left(tiny: Path) -> Iterator[Left]:
    made = Left(tiny)
    yield made
    for process in made.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def test_left_alone_looked_at_and_cancelled_then_taken_up_at_the_exact_step(
    left: Left,
    capsys: pytest.CaptureFixture[str],
    undisturbed: Path,
    computed: Callable[[Path], dict[str, Any]],
) -> None:
    assert main([*left.arguments, "--detach"]) == 0
    said = capsys.readouterr().out
    left.wait(left.held.exists)
    controller = left.controller()
    assert controller is not None and f"process {controller.pid}" in said

    with pytest.raises(TroubleError, match=f"process {controller.pid} on .*; only one controller"):
        main([*left.arguments, "--detach"])
    capsys.readouterr()

    left.wait(
        lambda: any("step" in (read_json(path) or {}) for path in left.folder.glob("jobs/*/1/heartbeat.json"))
    )
    assert main([*left.arguments, "--status"]) == 0
    shown = capsys.readouterr().out
    assert "default, seed 0" in shown and "running" in shown and "/6" in shown
    assert f"run by {controller}" in shown

    ending = subprocess.Popen(
        [sys.executable, "-m", "hpdm_core.study", *left.arguments, "--cancel"],
        stdout=subprocess.PIPE,
        text=True,
    )
    left.wait(lambda: "ending the workers" in (left.folder / "controller.log").read_text())
    time.sleep(0.5)
    left.hold.unlink()  # the third step ends, and with it the worker
    said, _ = ending.communicate(timeout=120)
    assert ending.returncode == 0 and f"asking {controller}" in said
    left.wait(lambda: not left.processes())
    assert main([*left.arguments, "--status"]) == 0
    assert "cancelled" in capsys.readouterr().out

    assert main(left.arguments) == 0
    (result,) = left.results.glob("store/train/*/result.json")
    assert json.loads(result.read_text())["resumed_from"] == [3]
    assert computed(left.results) == computed(undisturbed)
    assert main([*left.arguments, "--status"]) == 0
    assert "1 of 1 cells done; no controller is at work" in capsys.readouterr().out


def test_a_shot_worker_is_told_at_once_with_its_signal_and_its_last_words(left: Left) -> None:
    shown = left.results.with_name("shown.txt")
    with shown.open("wb") as output:
        study = subprocess.Popen(
            [sys.executable, "-m", "hpdm_core.study", *left.arguments], stdout=output, stderr=output
        )
    left.wait(left.held.exists)
    os.kill(left.worker().pid, signal.SIGKILL)
    assert study.wait(timeout=60) == 1
    assert "interrupted: default, seed 0" in shown.read_text() and "SIGKILL" in shown.read_text()
    assert "    | " in shown.read_text() and "train of default, seed 0" in shown.read_text()


def test_status_before_anything_ran_writes_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny.parent.rglob("*"))
    assert main([str(tiny), "--results", str(tiny.parent / "results"), "--status"]) == 0
    assert "planned" in capsys.readouterr().out and sorted(tiny.parent.rglob("*")) == before


def test_cancel_before_anything_ran_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "--results", str(tiny.parent / "results"), "--cancel"]) == 0
    assert "nothing runs" in capsys.readouterr().out and not (tiny.parent / "results").exists()


def test_inline_cannot_be_left(tiny: Path) -> None:
    with pytest.raises(InputError, match="--detach: the backend 'inline' runs in this very process"):
        main([str(tiny), "--results", str(tiny.parent / "results"), "--backend", "inline", "--detach"])


def test_ways_exclude_one_another(tiny: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tiny), "--status", "--cancel"])
    assert end.value.code == 2


# Workers


def test_a_first_request_waits_for_the_step_and_a_second_does_not() -> None:
    with interruption.watched():
        with pytest.raises(interruption.Interrupted) as outside:
            os.kill(os.getpid(), signal.SIGTERM)
        assert outside.value.code == 128 + signal.SIGTERM
    with interruption.watched():
        with pytest.raises(interruption.Interrupted) as second, interruption.deferred():
            os.kill(os.getpid(), signal.SIGUSR2)
            assert interruption.requested() == signal.SIGUSR2
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("a second request ends the work at once")
        assert second.value.signum == signal.SIGUSR2
        with pytest.raises(interruption.Interrupted), interruption.deferred():
            pytest.fail("a request before the block ends it at once")
    assert interruption.requested() is None


def test_a_request_during_the_last_step_is_not_forgotten() -> None:
    done = []
    with interruption.watched(), pytest.raises(interruption.Interrupted):
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the last step, saved")
        done.append("what comes after")
    assert done == ["the last step, saved"]


@pytest.mark.parametrize(
    ("limit", "notice", "ran", "cause"),
    [
        (24 * 3600, 90, 600, "preempted"),
        (24 * 3600, 90, 24 * 3600 - 100, "time limit"),
        (600, 90, 60, "preempted"),  # jobs of ten minutes are no exception
        (600, 90, 500, "time limit"),
        (60, 15, 5, "time limit"),
    ],
)
def test_a_signal_means_the_limit_only_near_the_limit(
    limit: float, notice: float, ran: float, cause: str
) -> None:
    slurm = {"limit_seconds": limit, "signal_seconds": notice}
    assert _cause(signal.SIGUSR2, ran, slurm) == cause
    assert _cause(signal.SIGTERM, ran, slurm) is None


def test_a_heart_counts_and_an_older_one_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpdm_core.store.heartbeat.BEAT_SECONDS", 0.01)

    def beat() -> dict[str, Any]:
        return read_json(tmp_path / "heartbeat.json") or {}

    write_json(tmp_path / "error.json", {"message": "of the run before it was requeued"})
    with JobHeartbeat(tmp_path) as older:
        assert not (tmp_path / "error.json").exists()
        first = beat()["beat"]
        deadline = time.monotonic() + 5
        while beat()["beat"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beat()["beat"] > first
        older.gpus = 2
        with JobHeartbeat(tmp_path) as newer:
            newer.show({"step": 7})
            assert newer.mine() and not older.mine()
            older.show({"step": 3})
            older.say("error.json", {"message": "from the grave"})
            time.sleep(0.05)
            assert beat()["step"] == 7 and not (tmp_path / "error.json").exists()
        newer.say("end.json", {"cause": "preempted"})
        assert read_json(tmp_path / "end.json") == {"cause": "preempted"}


def test_the_seconds_of_a_requeued_job_add_up(tmp_path: Path) -> None:
    write_json(tmp_path / "heartbeat.json", {"beat": 4, "seconds": 100.0})
    with JobHeartbeat(tmp_path):
        assert (read_json(tmp_path / "heartbeat.json") or {})["seconds"] >= 100.0
