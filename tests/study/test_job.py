"""A worker's last words: what it says when it is asked to end, and whether it goes back into the queue."""

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.files import read_json
from hpdm_core.base.interruption import Interrupted
from hpdm_core.store.failures import TimeLimit
from hpdm_core.store.heartbeat import JobHeartbeat, Reporter
from hpdm_core.study.worker.run_cell import _ended_in_order, _rank, run_job

LONG = {"limit_seconds": 24 * 3600, "signal_seconds": 90}
SHORT = {"limit_seconds": 60, "signal_seconds": 15}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that notes what it is asked; it refuses while the file "refuses" is there."""
    path = tmp_path / "bin" / "scontrol"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ -e {tmp_path}/refuses ] && exit 1\necho "$@" >> {tmp_path}/asked\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    return tmp_path


def asked(folder: Path) -> str:
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


def end(folder: Path, cell: Any, signum: int, slurm: dict[str, Any] | None, *, advances: bool = True) -> Any:
    """Ask a worker to end, and return its last word."""
    expected = pytest.raises((Interrupted, TimeLimit))
    with JobHeartbeat(folder) as heart, expected as raised, _ended_in_order(cell, heart, slurm):
        if advances:
            stage = cell.missing()[0].stage.folder
            (stage / "attempts" / "1" / "checkpoints" / "00000007").mkdir(parents=True)
        raise Interrupted(signum)
    return raised.value if isinstance(raised.value, TimeLimit) else read_json(folder / "end.json")


def test_a_fast_worker_shows_its_first_step_at_once() -> None:
    class Folder:
        def heartbeat(self, progress: dict[str, Any]) -> None: ...

    shown: list[Any] = []
    report = Reporter("train", Folder(), lambda progress: shown.append(progress.get("step")))  # type: ignore[arg-type]
    for progress in ({}, {"step": 1, "steps": 4}, {"step": 2, "steps": 4}, {"step": 4, "steps": 4}):
        report(progress)
    assert shown == [None, 1, 4]


def test_time_is_up_and_it_goes_back_into_the_queue(scontrol: Path, cell: Any) -> None:
    word = end(scontrol, cell("a"), signal.SIGUSR2, SHORT)
    assert word == {"signal": "SIGUSR2", "cause": "time limit", "requeued": True}
    assert asked(scontrol) == "requeue 80\n"


def test_an_element_of_an_array_is_requeued_by_its_own_number(
    scontrol: Path, cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert end(scontrol, cell("a"), signal.SIGUSR2, LONG)["cause"] == "preempted"
    assert asked(scontrol) == "requeue 77_3\n"


def test_a_refused_requeue_is_left_to_the_controller(scontrol: Path, cell: Any) -> None:
    (scontrol / "refuses").touch()
    assert end(scontrol, cell("a"), signal.SIGUSR2, LONG)["requeued"] is False


def test_a_limit_too_short_for_one_step_is_a_failure(scontrol: Path, cell: Any) -> None:
    error = end(scontrol, cell("a"), signal.SIGUSR2, SHORT, advances=False)
    assert isinstance(error, TimeLimit) and "backend.time" in str(error) and asked(scontrol) == ""


def test_a_preemption_before_the_first_step_is_none(scontrol: Path, cell: Any) -> None:
    assert end(scontrol, cell("a"), signal.SIGUSR2, LONG, advances=False)["requeued"] is True


@pytest.mark.parametrize(
    ("signum", "slurm"), [(signal.SIGTERM, LONG), (signal.SIGTERM, None), (signal.SIGUSR2, None)]
)
def test_who_was_cancelled_does_not_requeue_itself(
    scontrol: Path, cell: Any, signum: int, slurm: dict[str, Any] | None
) -> None:
    word = end(scontrol, cell("a"), signum, slurm)
    assert word["requeued"] is False and word["cause"] is None and asked(scontrol) == ""


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "2"}, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SUBMITIT_LOCAL_GLOBALID": "3"}, 3),
    ],
)
def test_one_of_several_processes_writes(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int
) -> None:
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _rank() == rank


def run_and_fail(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, *, rank: int) -> str:
    def broken(spec: Any) -> Any:
        raise error

    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", str(rank))
    monkeypatch.setattr("hpdm_core.study.worker.run_cell.Cell.from_spec", broken)
    with pytest.raises(type(error)):
        run_job(str(folder / "spec.json"))
    return str((read_json(folder / "error.json") or {}).get("kind"))


def test_the_process_that_failed_has_the_word_not_the_one_that_missed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spec.json").write_text("{}")
    gone, bug = RuntimeError("Connection closed by peer"), ValueError("bug")
    assert run_and_fail(tmp_path, gone, monkeypatch, rank=1) == "None"
    assert run_and_fail(tmp_path, gone, monkeypatch, rank=0) == "lost node"
    assert run_and_fail(tmp_path, MemoryError(), monkeypatch, rank=1) == "out of memory"
    assert run_and_fail(tmp_path, bug, monkeypatch, rank=1) == "out of memory"
    assert run_and_fail(tmp_path, bug, monkeypatch, rank=0) == "code error"
