"""What follows an attempt without results, by class of failure; and budgets."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.config.study_file import Budget, load_study
from hpdm_core.errors import InputError
from hpdm_core.files import write_json
from hpdm_core.study.budget import Spending
from hpdm_core.study.jobs import Job
from hpdm_core.study.retries import Outcome, halved, mark_of, pause, refusal, try_again


def ended(cause: Any, *, begun: int = 0, reached: int = 0, micro_batch: int | None = None) -> Outcome:
    return Outcome(
        state="failed", cause=cause, reason="", begun=[begun], reached=[reached], micro_batch=micro_batch
    )


@pytest.mark.parametrize(
    ("outcomes", "again"),
    [
        ([], True),
        ([ended("lost node")] * 20, True),
        ([ended("preempted")] * 20, True),
        ([ended("out of memory")], True),
        ([ended("out of memory"), ended("out of memory", micro_batch=1)], False),
        ([ended("out of memory"), ended("lost node"), ended("out of memory", micro_batch=1)], False),
        ([ended("time limit", begun=0, reached=5)], True),
        ([ended("time limit", begun=0, reached=5), ended("time limit", begun=5, reached=5)], False),
        ([ended("never started")] * 2, True),
        ([ended("never started")] * 3, False),
        ([*[ended("never started")] * 2, ended("lost node"), ended("never started")], True),
        ([ended("code error")], False),
        ([ended("diverged")], False),
        ([ended("killed")], False),
        ([ended("cancelled")], False),
        ([ended("full disk")], False),
        ([ended("lost node"), ended("code error")], False),
    ],
)
def test_by_class(outcomes: Sequence[Outcome], again: bool) -> None:
    assert try_again(outcomes) is again
    if not again:
        assert isinstance(refusal(outcomes), str)


def test_what_gets_nowhere_is_tried_ever_less_often() -> None:
    stuck, moved = ended("lost node"), ended("lost node", begun=1, reached=2)
    pauses = [pause([stuck] * count) for count in range(1, 12)]
    assert pauses[0] == 0 and pauses[1] > 0 and pauses == sorted(pauses) and max(pauses) < 1000
    assert pause([*[stuck] * 9, moved]) == 0


def spec(batch: int, micro_batch: int | None) -> dict[str, Any]:
    return {"config": {"training": {"batch": batch}, "runtime": {"micro_batch": micro_batch, "threads": 1}}}


@pytest.mark.parametrize(
    ("batch", "now", "half"), [(8, None, 4), (8, 3, 2), (8, 2, 1), (8, 1, None), (1, None, None)]
)
def test_the_micro_batch_is_halved_and_the_global_batch_stays(
    batch: int, now: int | None, half: int | None
) -> None:
    found = halved(spec(batch, now))
    if half is None:
        assert found is None
        return
    assert found is not None
    assert found[1] == half and found[0] == spec(batch, half)


def test_a_mark_grows_with_checkpoints_videos_and_stages(tmp_path: Path, cell: Any) -> None:
    one = cell("a")
    marks = [mark_of(one)]
    stage = one.missing()[0].stage
    for step in (9, 10):
        (stage.folder / "attempts" / "1" / "checkpoints" / f"{step:08d}").mkdir(parents=True)
        marks.append(mark_of(one))
    (stage.folder / "000000.safetensors").touch()
    marks.append(mark_of(one))
    write_json(stage.folder / "result.json", {})
    marks.append(mark_of(one))
    assert all(before < after for before, after in itertools.pairwise(marks))


def job(folder: Path, number: int, **beat: Any) -> Job:
    made = Job(cell="c", number=number, folder=folder / str(number))
    made.folder.mkdir()
    write_json(made.folder / "heartbeat.json", beat)
    return made


def test_gpu_hours_are_counted_over_all_attempts(tmp_path: Path) -> None:
    spending = Spending(Budget(max_gpu_hours=3.0))
    spending.add([job(tmp_path, 1, seconds=3600.0, gpus=2), job(tmp_path, 2, seconds=1800.0, gpus=1)])
    assert spending.gpu_hours == 2.5 and spending.exhausted(0) == ""
    running = job(tmp_path, 3)
    for seconds in (600.0, 1800.0):  # one attempt's newest figure counts
        spending.note(running, {"seconds": seconds, "gpus": 1})
    assert spending.gpu_hours == 3.0 and "max_gpu_hours" in spending.exhausted(0)


def test_failures_are_counted() -> None:
    spending = Spending(Budget(max_failures=2))
    assert spending.exhausted(1) == "" and "max_failures" in spending.exhausted(2)
    assert Spending(Budget()).exhausted(10_000) == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("budget.max_gpu_hour=1", "did you mean 'max_gpu_hours'"),
        ("budget.max_failures=0", "budget.max_failures"),
        ("backend={use: slurm, partitoin: gpu}", "did you mean 'partition'"),
        ("backend={use: slurm, time: soon}", "backend.time"),
    ],
)
def test_wrong_keys_are_told_with_the_nearest(tiny: Path, given: str, said: str) -> None:
    from hpdm_core.study.backends import BACKENDS

    with pytest.raises(InputError, match=said):
        load_study(tiny, sets=[given], backends=BACKENDS)
