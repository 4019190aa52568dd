import csv
import errno
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import write_json
from hpdm_core.hookspecs import hookimpl
from hpdm_core.store.lease import Lease, Process
from hpdm_core.study.backends.interface import Job, SchedulerStatus, SystemClock
from hpdm_core.study.controller import controller as controller_module


def index(folder: Path) -> dict[tuple[str, str], str]:
    with (folder / "tiny" / "index.csv").open() as file:
        return {(row["arm"], row["seed"]): row["state"] for row in csv.DictReader(file)}


def test_every_cell_is_run_stage_by_stage(study: Any, cell: Any, tmp_path: Path) -> None:
    run = study([cell("a"), cell("b", 1)])
    assert run.code == 0
    assert run.made == [
        "train for a, seed 0 #1",
        "evaluate loss for a, seed 0 #1",
        "train for b, seed 1 #1",
        "evaluate loss for b, seed 1 #1",
    ]
    assert index(tmp_path) == {("a", "0"): "done", ("b", "1"): "done"}


def test_what_is_done_is_not_done_again(study: Any, cell: Any) -> None:
    study([cell("a")])
    again = study([cell("a")])
    assert again.code == 0 and again.made == []


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"arm": "b"}, ["train for b, seed 0 #1", "evaluate loss for b, seed 0 #1"]),
        ({"arm": "a", "seed": 1}, ["train for a, seed 1 #1", "evaluate loss for a, seed 1 #1"]),
        ({"arm": "a", "metrics": ("loss", "frechet")}, ["evaluate frechet for a, seed 0 #1"]),
    ],
)
def test_an_addition_runs_only_what_is_new(
    study: Any, cell: Any, more: dict[str, Any], made: list[str]
) -> None:
    study([cell("a")])
    run = study([cell(**more)] if "metrics" in more else [cell("a"), cell(**more)])
    assert run.code == 0 and run.made == made


def test_two_cells_of_one_model_train_it_once(study: Any, cell: Any) -> None:
    run = study([cell("a", model="m"), cell("b", model="m", metrics=("loss", "other"))])
    assert [line for line in run.made if line.startswith("train")] == ["train for a, seed 0 #1"]


class Threads:
    """A backend whose jobs all run at once, as far as the controller lets them."""

    attached = queued = made_up = False
    grace = 8.0
    gpus = 0

    def __init__(self, job: Any) -> None:
        self.clock = SystemClock()
        self.job = job
        self.threads: dict[str, threading.Thread] = {}

    def check(self) -> None: ...

    def free_slots(self, under_way: Sequence[Job]) -> int:
        return 4 - len(under_way)

    def interval(self, under_way: int) -> float:
        return 0.05

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            write_json(job.folder / "job.json", {})
            self.threads[job.id] = threading.Thread(target=self.job, args=(str(job.spec),))
            self.threads[job.id].start()

    def poll(self, jobs: Sequence[Job]) -> dict[str, SchedulerStatus]:
        alive = {job.id: job.id in self.threads and self.threads[job.id].is_alive() for job in jobs}
        return {
            identity: SchedulerStatus(phase="alive" if each else "over") for identity, each in alive.items()
        }

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        return True


def test_cells_of_one_model_wait_for_it_and_others_do_not(study: Any, cell: Any, fake_job: Any) -> None:
    under_way: set[str] = set()
    together: list[set[str]] = []

    def job(path: str) -> None:
        name = json.loads(Path(path).read_text())["cell"]
        under_way.add(name)
        time.sleep(1.0)
        together.append(set(under_way))
        fake_job(path)
        under_way.discard(name)

    cells = [cell("a", model="m"), cell("b", model="m", metrics=("x",)), cell("c", model="n")]
    run = study(cells, backend=Threads(job))
    assert run.code == 0
    assert {"a, seed 0", "c, seed 0"} in together
    assert not any({"a, seed 0", "b, seed 0"} <= names for names in together)
    assert sum(line.startswith("train") for line in run.made) == 2


def test_a_failed_cell_is_one_line_and_the_others_go_on(study: Any, cell: Any, tmp_path: Path) -> None:
    run = study([cell("a", fails="train"), cell("b")])
    assert run.code == 1
    assert index(tmp_path) == {("a", "0"): "failed", ("b", "0"): "done"}
    lines = [line for line in run.text.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1
    assert "a, seed 0: train went wrong" in lines[0] and "attempts/1/log.txt" in lines[0]


def test_a_failed_cell_is_run_again_only_on_request(study: Any, cell: Any) -> None:
    study([cell("a", fails="evaluate loss")])
    again = study([cell("a")])
    assert again.code == 1 and again.made == [] and "--retry-failed" in again.text
    retried = study([cell("a")], retry_failed=True)
    assert retried.code == 0 and retried.made == ["evaluate loss for a, seed 0 #2"]


def test_a_retry_that_fails_again_is_tried_once(study: Any, cell: Any) -> None:
    study([cell("a", fails="train")])
    retried = study([cell("a", fails="train")], retry_failed=True)
    assert retried.code == 1 and retried.made == ["train for a, seed 0 #2"]


def test_a_model_that_failed_is_not_tried_by_each_of_its_cells(study: Any, cell: Any) -> None:
    cells = [cell("a", model="m", fails="train"), cell("b", model="m", metrics=("x",), fails="train")]
    for options in ({}, {"retry_failed": True}):
        run = study(cells, **options)
        assert run.code == 1
        assert sum(line.startswith("train") for line in run.made) == 1
        assert run.text.count("train went wrong") >= 2


def test_a_refusal_ends_nothing_that_is_under_way(study: Any, cell: Any, fake_job: Any) -> None:
    class Full(Threads):
        """Takes one job at a time."""

        def submit(self, jobs: Sequence[Job]) -> None:
            if not any(thread.is_alive() for thread in self.threads.values()):
                super().submit(jobs[:1])
                jobs = jobs[1:]
            if jobs:
                raise TroubleError("sbatch refused the job: a word nobody knows")

    def job(path: str) -> None:
        time.sleep(0.3)
        fake_job(path)

    run = study([cell("a"), cell("b"), cell("c")], backend=Full(job))
    assert run.code == 0 and len(run.made) == 6
    assert run.text.count("no more are submitted for now: sbatch refused the job: a word nobody knows") == 1

    class Shut(Threads):
        def submit(self, jobs: Sequence[Job]) -> None:
            raise TroubleError("sbatch refused the job: invalid partition")

    with pytest.raises(TroubleError, match="invalid partition"):
        study([cell("d")], backend=Shut(None))


def test_a_worker_that_was_killed_is_run_again(study: Any, cell: Any, tmp_path: Path) -> None:
    class Killed(Threads):
        def submit(self, jobs: Sequence[Job]) -> None:
            for job in jobs:
                write_json(job.folder / "job.json", {})
                write_json(job.folder / "heartbeat.json", {"beat": 1})

    killed = study([cell("a")], backend=Killed(None))
    assert killed.code == 1 and "exited without reporting a result" in killed.text
    assert index(tmp_path) == {("a", "0"): "interrupted"}
    again = study([cell("a")])
    assert again.code == 0 and len(again.made) == 2


def test_a_second_controller_names_the_first(study: Any, cell: Any, tmp_path: Path) -> None:
    with Lease(tmp_path / "tiny" / "controller.lock"), pytest.raises(TroubleError) as error:
        study([cell("a")])
    here = Process.here()
    assert f"process {here.pid} on {here.host.partition(':')[0]}" in str(error.value)


def test_the_lock_of_a_dead_controller_is_taken_over(study: Any, cell: Any, tmp_path: Path) -> None:
    lock = tmp_path / "tiny" / "controller.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({**Process.here().to_json(), "start": "before the boot", "token": "x"}))
    assert study([cell("a")]).code == 0


def test_ctrl_c_ends_workers_keeps_work_and_says_how_to_go_on(
    study: Any, cell: Any, tmp_path: Path, fake_job: Any
) -> None:
    def job(path: str, progress: Any) -> None:
        if "b, seed" in Path(path).read_text():
            raise KeyboardInterrupt
        fake_job(path, progress)

    run = study([cell("a"), cell("b")], job=job)
    assert run.code == 130
    assert "1 of 2 cells done" in run.text and "same command again" in run.text
    assert index(tmp_path) == {("a", "0"): "done", ("b", "0"): "interrupted"}
    assert len(study([cell("a"), cell("b")]).made) == 2


def test_a_full_disk_is_one_line(
    study: Any, cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(controller_module, "write_bytes", full)
    with pytest.raises(TroubleError, match=r"study.yaml: could not be written: No space left") as error:
        study([cell("a")])
    assert len(error.value.messages) == 1
    monkeypatch.undo()
    assert study([cell("a")]).code == 0


def test_a_cell_that_met_a_full_disk_goes_on_with_the_next_command(study: Any, cell: Any) -> None:
    cells = [cell("a", model="m", fails="full disk"), cell("b", model="m", metrics=("x",))]
    full = study(cells)
    assert full.code == 1 and "could not be written" in full.text and len(full.made) == 1
    again = study([cell("a", model="m"), cell("b", model="m", metrics=("x",))])
    assert again.code == 0 and again.made[0] == "train for a, seed 0 #2"


def test_a_damaged_journal_is_one_line_and_the_work_goes_on(study: Any, cell: Any, tmp_path: Path) -> None:
    study([cell("a")])
    journal = tmp_path / "tiny" / "journal.log"
    journal.write_text("garbage\n" + journal.read_text())
    run = study([cell("a"), cell("b")])
    assert run.code == 1 and run.text.count("damaged (line 1 is not a record)") == 1
    assert index(tmp_path) == {("a", "0"): "done", ("b", "0"): "done"}
    assert study([cell("a"), cell("b")]).code == 0


def test_only_some_cells(study: Any, cell: Any, tmp_path: Path) -> None:
    run = study([cell("a")], others=[cell("b")])
    assert run.code == 0 and len(run.made) == 2
    assert index(tmp_path) == {("a", "0"): "done", ("b", "0"): "planned"}


def test_the_report_is_shown_and_observers_hear_the_end(study: Any, cell: Any, tmp_path: Path) -> None:
    only = cell("a")
    run = study([only], report=lambda folder: f"table of {folder.name}")
    assert "table of tiny" in run.text and only.heard == [tmp_path / "tiny"]


def test_the_versions_that_a_study_is_planned_with_are_kept(study: Any, cell: Any, tmp_path: Path) -> None:
    study([cell("a")])
    kept = json.loads((tmp_path / "tiny" / "versions.json").read_text())
    assert {"python", "hpdm", "torch"} <= set(kept) and "hpdm_plugins.model.fusions" in kept["plugins"]


class Raising:
    @hookimpl
    def after_study_finished(self) -> None:
        raise RuntimeError("an observer's own mistake")


def test_an_observer_of_the_end_that_raises_is_a_line_and_fails_nothing(
    study: Any, cell: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = cell("a", observers=[Raising()])
    run = study([only])
    assert run.code == 0 and only.heard == [tmp_path / "tiny"]
    (line,) = caplog.messages
    assert "after_study_finished: RuntimeError: an observer's own mistake" in line and "Raising" in line


def test_a_report_that_fails_is_trouble(study: Any, cell: Any) -> None:
    def report(folder: Path) -> str:
        raise TroubleError("no rows")

    run = study([cell("a")], report=report)
    assert run.code == 1 and "error: report: no rows" in run.text
