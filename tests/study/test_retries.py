"""What follows an attempt without results, by class of failure; and budgets."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import write_json
from hpdm_core.cell.mark import mark_of
from hpdm_core.config.study_keys import Budget
from hpdm_core.study.backends.interface import Job
from hpdm_core.study.controller.budget import Spending
from hpdm_core.study.controller.retries import Outcome, pause, refusal, smaller, told, try_again, with_runtime
from hpdm_core.study.plan.study_file import load_study


def ended(cause: Any, *, begun: int = 0, reached: int = 0, stage: Any = None) -> Outcome:
    return Outcome(state="failed", cause=cause, reason="", begun=[begun], reached=[reached], stage=stage)


@pytest.mark.parametrize(
    ("outcomes", "again"),
    [
        ([], True),
        ([ended("lost node")] * 20, True),
        ([ended("preempted")] * 20, True),
        ([ended("out of memory")], True),
        ([ended("out of memory", stage="train")] * 9, True),
        ([ended("out of memory", stage="samples")] * 9, True),
        ([ended("out of memory", stage="train"), ended("out of memory", stage="evaluations")], True),
        ([ended("out of memory", stage="evaluations")] * 2, False),
        ([ended("out of memory", stage="evaluations"), ended("out of memory", stage="train")], True),
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


def test_what_ran_out_of_memory_is_not_the_same_again_and_waits_for_nothing() -> None:
    short = ended("out of memory", stage="train")
    assert pause([short] * 9) == 0 and pause([ended("lost node"), short, ended("lost node")]) == 0


def spec(*, processes: int | None = None, batch: int = 8, **runtime: int | None) -> dict[str, Any]:
    """An attempt at a cell of 2 x 2 x 2 tiles at its finest level, 27 with their overlap."""
    model = {"video": [4, 8, 16], "patch": [2, 4, 8], "token": [1, 1, 1], "levels": 2}
    config = {
        "model": model,
        "training": {"batch": batch},
        "sampling": {"overlap": ["f", "h", "w"]},
        "evaluation": {"samples": 6},
        "runtime": {"micro_batch": None, "tile_batch": 256, "sample_batch": 16, "threads": 1, **runtime},
    }
    return {"config": config, "attempt": "a.1", **({} if processes is None else {"processes": processes})}


def retries(first: dict[str, Any], stage: Any) -> list[dict[str, int]]:
    """What each attempt after the first is given, while all run out of memory."""
    made: list[dict[str, int]] = []
    now = first
    while (less := smaller(now, stage)) is not None:
        made.append(less)
        now = with_runtime(now, {**now.get("smaller", {}), **less})
        assert now["config"] == {**first["config"], "runtime": {**now["config"]["runtime"]}}
        assert len(made) < 20
    return made


@pytest.mark.parametrize(
    ("first", "numbers"),
    [
        (spec(batch=8), [4, 2, 1]),
        (spec(batch=64, processes=8), [4, 2, 1]),
        (spec(batch=9, processes=2), [3, 2, 1]),
        (spec(batch=64, processes=8, micro_batch=3), [2, 1]),
        (spec(batch=64, processes=8, micro_batch=32), [4, 2, 1]),
        (spec(batch=64, processes=64), []),
        (spec(batch=8, micro_batch=1), []),
    ],
)
def test_training_takes_half_of_what_one_process_takes(first: dict[str, Any], numbers: list[int]) -> None:
    assert retries(first, "train") == [{"micro_batch": number} for number in numbers]


@pytest.mark.parametrize(
    ("first", "tiles", "videos"),
    [
        (spec(tile_batch=8), [4, 2, 1], [3, 2, 1]),
        (spec(tile_batch=8, sample_batch=2), [4, 2, 1], [1]),
        (spec(), [81, 41, 21, 11, 6, 3, 2, 1], [3, 2, 1]),  # 6 videos of 27 tiles are all there are
        (spec(tile_batch=1, sample_batch=1), [], []),
    ],
)
def test_sampling_takes_half_the_tiles_and_then_half_the_videos(
    first: dict[str, Any], tiles: list[int], videos: list[int]
) -> None:
    wanted = [{"tile_batch": number} for number in tiles] + [{"sample_batch": number} for number in videos]
    assert retries(first, "samples") == wanted


def test_an_evaluation_takes_half_of_both() -> None:
    assert smaller(spec(tile_batch=8), "evaluations") == {"tile_batch": 4, "sample_batch": 3}
    assert smaller(spec(tile_batch=1, sample_batch=1), "evaluations") is None
    assert told({"tile_batch": 4, "sample_batch": 3}) == "tile batches of 4 and sample batches of 3"


def test_a_setting_that_is_smaller_already_stays() -> None:
    made = with_runtime(spec(micro_batch=2, tile_batch=64), {"micro_batch": 4, "tile_batch": 8})
    assert made["config"]["runtime"] == spec(micro_batch=2, tile_batch=8)["config"]["runtime"]
    assert made["smaller"] == {"micro_batch": 2, "tile_batch": 8}


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

    with pytest.raises(InputError, match=said):
        load_study(tiny, sets=[given])
