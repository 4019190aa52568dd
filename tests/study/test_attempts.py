"""The controller and attempts that end in every way: what is tried again, what is told, what is never lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.config.study_keys import Budget
from hpdm_core.store.lease import Process
from hpdm_core.study.backends.interface import Job, SchedulerStatus
from hpdm_core.study.controller.controller import CANCEL
from hpdm_core.study.ledger import lock as locking

ALIVE, DEAF = SchedulerStatus(phase="alive"), SchedulerStatus(phase="unknown", word="squeue: no answer")


def over(cause: Any = None, **more: Any) -> SchedulerStatus:
    return SchedulerStatus(phase="over", cause=cause, **more)


class Script:
    """A backend whose attempts go as told, on a clock of its own.

    ``acts``: for each attempt in turn what is seen of it, poll by poll; the last stays. A function among them
    is called with the job, and the next is seen.
    """

    attached = queued = made_up = False
    grace = 8.0

    def __init__(self, *acts: Sequence[Any], slots: int = 4, gpus: int = 0, delivered: bool = True) -> None:
        self.clock = self
        self.now = 0.0
        self.acts = [list(act) for act in acts]
        self.slots = slots
        self.gpus = gpus
        self.delivered = delivered
        self.jobs: list[Job] = []
        self.specs: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self._left: dict[str, list[Any]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None: ...

    def free_slots(self, under_way: Sequence[Job]) -> int:
        return self.slots - len(under_way)

    def interval(self, under_way: int) -> float:
        return 10.0

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            write_json(job.folder / "job.json", {"script": len(self.jobs)})
            self._left[job.id] = list(self.acts[min(len(self.jobs), len(self.acts) - 1)])
            self.jobs.append(job)
            self.specs.append(read_json(job.spec) or {})

    def poll(self, jobs: Sequence[Job]) -> dict[str, SchedulerStatus]:
        return {job.id: self._look(job) for job in jobs}

    def _look(self, job: Job) -> SchedulerStatus:
        left = self._left.get(job.id, [over()])
        while callable(left[0]):
            left.pop(0)(job)
        seen: SchedulerStatus = left.pop(0) if len(left) > 1 else left[0]
        return seen

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        for job in jobs:
            self.cancelled.append(job.id)
            self._left[job.id] = [over("cancelled")]
        return self.delivered


def beat(number: int = 1, **more: Any) -> Callable[[Job], None]:
    return lambda job: write_json(job.folder / "heartbeat.json", {"beat": number, "born": 1, **more})


@pytest.fixture
def finish(fake_job: Any) -> Callable[[Job], None]:
    """What a worker does that gets to the end."""
    return lambda job: fake_job(str(job.spec))


def index(folder: Path) -> list[str]:
    return [row.rpartition(",")[2] for row in (folder / "tiny" / "index.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("cause", ["lost node", "preempted"])
def test_a_lost_node_and_a_preemption_are_always_tried_again(
    study: Any, cell: Any, finish: Any, tmp_path: Path, cause: str
) -> None:
    lost = [beat(), ALIVE, over(cause)]
    backend = Script(*[lost[:] for _ in range(6)], [beat(), ALIVE, finish, over()])
    run = study([cell("a")], backend=backend)
    assert run.code == 0 and len(backend.jobs) == 7 and run.text.count("it is tried again") == 6
    assert [job.number for job in backend.jobs] == list(range(1, 8))
    # Whatever may still run is cancelled before the next one starts.
    assert backend.cancelled == [job.id for job in backend.jobs[:6]]
    causes = [(read_json(job.folder / "outcome.json") or {})["cause"] for job in backend.jobs]
    assert causes == [cause] * 6 + [None]


def test_without_an_answer_nothing_that_may_run_is_started_again(study: Any, cell: Any) -> None:
    backend = Script([beat(), ALIVE, DEAF], delivered=False)
    run = study([cell("a")], backend=backend)
    assert run.code == 1 and len(backend.jobs) == 1
    assert "no sign of life" in run.text and "squeue: no answer" in run.text
    assert backend.now >= 600


def test_a_beating_worker_is_running_though_nobody_answers(study: Any, cell: Any, finish: Any) -> None:
    acts: list[Any] = []
    for number in range(200):  # more than half an hour
        acts += [beat(number), DEAF]
    backend = Script([*acts, finish, over()])
    run = study([cell("a")], backend=backend)
    assert run.code == 0 and len(backend.jobs) == 1 and backend.now > 1800


def test_results_count_though_nobody_answers(study: Any, cell: Any, finish: Any) -> None:
    backend = Script([beat(), DEAF, finish, DEAF], delivered=False)
    assert study([cell("a")], backend=backend).code == 0
    assert backend.now < 600


def test_what_an_older_attempt_still_writes_is_ignored(study: Any, cell: Any, finish: Any) -> None:
    def late(job: Job) -> None:
        older = job.folder.parent / "1"
        write_json(
            older / "error.json", {"kind": "code error", "message": "from the grave", "passing": False}
        )
        write_json(older / "heartbeat.json", {"beat": 99, "born": 0})

    backend = Script([beat(), over("lost node")], [late, beat(), ALIVE, finish, over()])
    run = study([cell("a")], backend=backend)
    assert run.code == 0 and "from the grave" not in run.text


class WithConfig:
    """A fake cell whose spec has what retries need to know."""

    def __init__(self, cell: Any, batch: int) -> None:
        self._cell, self._batch = cell, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def spec(self) -> dict[str, Any]:
        config = {
            "model": {"video": [4, 2, 2], "patch": [2, 2, 2], "token": [1, 1, 1], "levels": 2},
            "training": {"batch": self._batch},
            "sampling": {"overlap": []},
            "evaluation": {"samples": 9},
            "runtime": {"micro_batch": None, "tile_batch": 4, "sample_batch": 2},
        }
        return {**self._cell.spec(), "config": config}


def test_out_of_memory_is_tried_again_with_half_the_micro_batch_until_it_fits(
    study: Any, cell: Any, finish: Any
) -> None:
    short = [beat(), over("out of memory")]
    backend = Script(short, short[:], [beat(), ALIVE, finish, over()])
    run = study([WithConfig(cell("a"), 8)], backend=backend)
    assert run.code == 0 and "micro-batches of 4" in run.text and "micro-batches of 2" in run.text
    assert [spec["config"]["runtime"]["micro_batch"] for spec in backend.specs] == [None, 4, 2]
    assert all(spec["config"]["training"]["batch"] == 8 for spec in backend.specs)
    outcomes = [read_json(job.folder / "outcome.json") or {} for job in backend.jobs]
    assert [each["smaller"] for each in outcomes] == [{}, {"micro_batch": 4}, {"micro_batch": 2}]
    assert [each["stage"] for each in outcomes] == ["train", "train", None]


def test_out_of_memory_with_one_video_has_failed_until_it_is_asked_for(
    study: Any, cell: Any, finish: Any
) -> None:
    backend = Script([beat(), over("out of memory")])
    run = study([WithConfig(cell("a"), 8)], backend=backend)
    assert run.code == 1 and len(backend.jobs) == 4 and "also with micro-batches of 1" in run.text
    again = Script([finish, over()])
    assert study([WithConfig(cell("a"), 8)], backend=again).code == 1 and again.jobs == []
    asked = Script([beat(), finish, over()])
    assert study([WithConfig(cell("a"), 8)], backend=asked, retry_failed=True).code == 0
    assert asked.specs[0]["config"]["runtime"]["micro_batch"] is None


def test_where_memory_ran_out_decides_what_is_halved(study: Any, cell: Any, finish: Any) -> None:
    def says(stage: str) -> Callable[[Job], None]:
        said = {"kind": "out of memory", "stage": stage, "message": "out of memory", "passing": False}
        return lambda job: write_json(job.folder / "error.json", said)

    backend = Script(
        *[[beat(), says(stage), over()] for stage in ("samples", "train", "samples")],
        [beat(), finish, over()],
    )
    run = study([WithConfig(cell("a"), 8)], backend=backend)
    assert run.code == 0 and "tile batches of 2" in run.text
    settings = [spec["config"]["runtime"] for spec in backend.specs]
    assert [(each["micro_batch"], each["tile_batch"], each["sample_batch"]) for each in settings] == [
        (None, 4, 2),
        (None, 2, 2),
        (4, 2, 2),
        (4, 1, 2),
    ]


def test_a_batch_of_one_cannot_be_halved_and_is_not_tried_again(study: Any, cell: Any) -> None:
    backend = Script([beat(), over("out of memory")])
    assert study([WithConfig(cell("a"), 1)], backend=backend).code == 1 and len(backend.jobs) == 1


def checkpoint(step: int, root: Path) -> Callable[[Job], None]:
    def make(job: Job) -> None:
        (root / "store" / "train" / "a0" / "attempts" / "1" / "checkpoints" / f"{step:08d}").mkdir(
            parents=True
        )

    return make


def test_a_time_limit_is_tried_again_while_it_advances(study: Any, cell: Any, tmp_path: Path) -> None:
    backend = Script(
        [beat(), checkpoint(5, tmp_path), over("time limit")],
        [beat(), checkpoint(9, tmp_path), over("time limit")],
        [beat(), over("time limit")],
    )
    run = study([cell("a")], backend=backend)
    assert run.code == 1 and len(backend.jobs) == 3
    assert "without getting any further; raise backend.time" in run.text


def test_what_never_starts_is_given_up_in_the_end(study: Any, cell: Any) -> None:
    backend = Script([over()])
    run = study([cell("a")], backend=backend)
    assert run.code == 1 and len(backend.jobs) == 3 and "never started" in run.text


def test_a_killed_worker_is_told_with_its_signal_and_last_lines(study: Any, cell: Any) -> None:
    def dies(job: Job) -> None:
        (job.folder / "log").mkdir()
        (job.folder / "log" / "1_0_log.out").write_text("one\ntwo\n\nSegmentation fault\n")

    backend = Script([beat(), dies, over(signal="SIGSEGV")])
    run = study([cell("a")], backend=backend)
    assert run.code == 1 and len(backend.jobs) == 1
    assert "killed by SIGSEGV" in run.text and "    | Segmentation fault" in run.text


def test_gpu_hours_are_a_budget(study: Any, cell: Any, tmp_path: Path) -> None:
    backend = Script([beat(seconds=7200.0, gpus=2), ALIVE], slots=1, gpus=2)
    run = study([cell("a"), cell("b")], backend=backend, budget=Budget(max_gpu_hours=3))
    assert run.code == 1 and len(backend.jobs) == 1 and len(backend.cancelled) >= 1
    assert "4 of 3 GPU hours are spent" in run.text
    assert index(tmp_path) == ["interrupted", "planned"]
    again = Script([ALIVE], gpus=2)
    assert study([cell("a"), cell("b")], backend=again, budget=Budget(max_gpu_hours=3)).code == 1
    assert again.jobs == []


def test_failures_are_a_budget(study: Any, cell: Any, tmp_path: Path) -> None:
    def fails(job: Job) -> None:
        write_json(job.folder / "error.json", {"kind": "code error", "message": "bug", "passing": False})

    backend = Script([beat(), fails, over()], slots=1)
    run = study([cell(name) for name in "abcd"], backend=backend, budget=Budget(max_failures=2))
    assert run.code == 1 and len(backend.jobs) == 2 and "2 cells have failed, and 2 may" in run.text
    assert index(tmp_path) == ["failed", "failed", "planned", "planned"]


def test_detached_it_submits_what_there_is_room_for_and_comes_back(
    study: Any, cell: Any, finish: Any, tmp_path: Path
) -> None:
    cells = [cell(name) for name in "abc"]
    backend = Script([beat(), ALIVE], slots=2)
    run = study(cells, backend=backend, detach=True)
    assert run.code == 0 and len(backend.jobs) == 2 and backend.cancelled == []
    assert "2 cells are queued or running; 1 more" in run.text
    backend._left = {job.id: [finish, over()] for job in backend.jobs}
    backend.acts = [[beat(), finish, over()]]
    backend.clock = backend
    back = study(cells, backend=backend)
    assert back.code == 0 and len(backend.jobs) == 3 and index(tmp_path) == ["done"] * 3


def test_a_job_that_ended_while_nobody_looked_is_classified(study: Any, cell: Any, finish: Any) -> None:
    backend = Script([beat(), ALIVE])
    study([cell("a")], backend=backend, detach=True)
    backend._left = {backend.jobs[0].id: [over("lost node")]}
    backend.acts = [[beat(), finish, over()]] * 2
    assert study([cell("a")], backend=backend).code == 0
    assert (read_json(backend.jobs[0].folder / "outcome.json") or {})["cause"] == "lost node"


def test_a_request_to_cancel_is_honoured(study: Any, cell: Any, tmp_path: Path, finish: Any) -> None:
    def ask(job: Job) -> None:
        write_json(tmp_path / "tiny" / CANCEL, {"cancel": True})

    backend = Script([beat(), ALIVE, ask, ALIVE])
    run = study([cell("a"), cell("b")], backend=backend)
    assert run.code == 1 and "cancelled on request" in run.text
    assert index(tmp_path) == ["cancelled"] * 2 and not (tmp_path / "tiny" / CANCEL).exists()
    assert study([cell("a"), cell("b")], backend=Script([beat(), finish, over()])).code == 0


def test_a_vanished_folder_is_one_clear_line(study: Any, cell: Any, tmp_path: Path) -> None:
    def vanish(job: Job) -> None:
        shutil.rmtree(tmp_path / "tiny")

    backend = Script([beat(), ALIVE, vanish, ALIVE])
    with pytest.raises(TroubleError, match="the study's folder has vanished") as error:
        study([cell("a")], backend=backend)
    assert len(error.value.messages) == 1
    assert not (tmp_path / "tiny").exists()  # nothing is made up in its place
    assert len(backend.cancelled) >= 1


def test_a_lost_lock_ends_the_controller(study: Any, cell: Any, tmp_path: Path) -> None:
    def steal(job: Job) -> None:
        lock = tmp_path / "tiny" / "controller.lock"
        lock.write_text(json.dumps({**Process.here().to_json(), "token": "another's"}))

    backend = Script([beat(), ALIVE, steal, ALIVE])
    with pytest.raises(TroubleError, match="another process has taken this work over"):
        study([cell("a")], backend=backend)
    assert backend.cancelled == []  # the other one has the jobs now


def elsewhere(tmp_path: Path) -> Callable[[int], None]:
    lock = tmp_path / "tiny" / "controller.lock"
    lock.parent.mkdir(exist_ok=True)

    def write(number: int) -> None:
        lock.write_text(
            json.dumps({"host": "login2", "pid": 7, "start": "x", "token": "t", "beat": str(number)})
        )

    return write


def test_a_controller_on_another_host_that_lives_is_named(
    study: Any, cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = elsewhere(tmp_path)
    write(1)
    backend = Script([over()])
    monkeypatch.setattr(backend, "sleep", lambda seconds: (write(2), Script.sleep(backend, seconds)))
    with pytest.raises(TroubleError, match="process 7 on login2; only one controller"):
        study([cell("a")], backend=backend)
    assert backend.now < 5


def test_a_dead_controller_on_another_host_is_replaced(
    study: Any, cell: Any, finish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path)(1)
    backend = Script([beat(), finish, over()])
    monkeypatch.setattr(locking.Lease, "_watch", locking.Watch(backend.monotonic))
    run = study([cell("a")], backend=backend)
    assert run.code == 0 and "checking if it is alive" in run.text


class Planner:
    """Adds one cell after the other, and ends those that are told."""

    def __init__(self, cells: Sequence[Any], ends: str = "") -> None:
        self.cells, self.doomed = list(cells), ends
        self.heard: list[tuple[str, str, str | None]] = []

    def begin(self, storage: Any) -> None: ...

    def next(self, free: int) -> Sequence[Any]:
        return [self.cells.pop(0)] if self.cells and free else []

    def rows(self) -> list[tuple[list[str], str]]:
        return [([arm, "0", "", "", ""], state) for arm, state, cause in self.heard if cause != "pruned"]

    def ends(self, cell: Any) -> str | None:
        return "no better than the others" if cell.arm == self.doomed else None

    def settled(self, cell: Any, state: str, cause: str | None) -> None:
        self.heard.append((cell.arm, state, cause))

    def finished(self) -> bool:
        return not self.cells


def test_a_planner_adds_cells_ends_them_and_hears_of_each_once(
    study: Any, cell: Any, finish: Any, tmp_path: Path
) -> None:
    def step(job: Job) -> None:
        if json.loads(job.spec.read_text())["cell"].startswith("b"):
            return
        finish(job)

    planner = Planner([cell("a"), cell("b"), cell("c")], ends="b")
    backend = Script(*[[beat(), ALIVE, ALIVE, step, over()] for _ in range(3)], slots=1)
    run = study([], backend=backend, planner=planner)
    assert run.code == 0  # what was given up is not missing
    assert planner.heard == [("a", "done", None), ("b", "cancelled", "pruned"), ("c", "done", None)]
    assert index(tmp_path) == ["done", "done"]
    reasons = [(read_json(job.folder / "outcome.json") or {})["reason"] for job in backend.jobs]
    assert reasons[1] == "no better than the others"


def test_detached_it_does_not_wait_for_a_cell_that_waits_for_another(study: Any, cell: Any) -> None:
    cells = [cell("a", model="one"), cell("b", model="one")]  # one training for both
    backend = Script([beat(), ALIVE])
    run = study(cells, backend=backend, detach=True)
    assert run.code == 0 and len(backend.jobs) == 1 and backend.now < 60
    assert "1 cells are queued or running; 1 more" in run.text


def test_gpu_hours_of_cells_that_are_done_count_in_later_commands(study: Any, cell: Any, finish: Any) -> None:
    backend = Script([beat(seconds=7200.0, gpus=2), finish, over()], gpus=2)
    assert study([cell("a")], backend=backend, budget=Budget(max_gpu_hours=3)).code == 0
    later = Script([ALIVE], gpus=2)
    run = study([cell("a"), cell("b")], backend=later, budget=Budget(max_gpu_hours=3))
    assert run.code == 1 and later.jobs == [] and "4 of 3 GPU hours are spent" in run.text


def test_smaller_micro_batches_stay_when_another_command_takes_over(
    study: Any, cell: Any, finish: Any
) -> None:
    made = WithConfig(cell("a"), 8)
    first = Script([beat(), over("out of memory")], [beat(), over("killed")])
    assert study([made], backend=first).code == 1
    second = Script([beat(), finish, over()])
    assert study([made], backend=second).code == 0
    specs = [*first.specs, *second.specs]
    assert [spec["config"]["runtime"]["micro_batch"] for spec in specs] == [None, 4, 4]
