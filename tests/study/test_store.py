from pathlib import Path

import pytest

from hpdm_core.errors import TroubleError
from hpdm_core.study.lease import Held
from hpdm_core.study.store import Stage, Store


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Store(tmp_path).stage("train", "abc")


def test_a_stage_that_is_only_looked_at_writes_nothing(stage: Stage, tmp_path: Path) -> None:
    assert not stage.done and stage.attempts() == [] and stage.failure() is None and stage.holder() is None
    assert list(tmp_path.iterdir()) == []


def test_finishing_moves_files_into_place_and_writes_the_result(stage: Stage) -> None:
    with stage.claim() as attempt:
        (attempt.folder / "w").write_text("weights")
        attempt.finish({"steps": 3}, files={"w": "model.safetensors"})
    assert stage.result() == {"steps": 3}
    assert (stage.folder / "model.safetensors").read_text() == "weights"
    assert stage.holder() is None


def test_the_result_is_written_after_the_files(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("hpdm_core.study.store.publish", crash)
    with pytest.raises(RuntimeError), stage.claim() as attempt:
        (attempt.folder / "w").write_text("weights")
        attempt.finish({}, files={"w": "model.safetensors"})
    assert not stage.done


def test_half_a_result_is_none(stage: Stage) -> None:
    stage.folder.mkdir(parents=True)
    (stage.folder / "result.json").write_text('{"steps": ')
    assert not stage.done


def test_attempts_count_up_and_know_the_ended_ones(stage: Stage) -> None:
    for _ in range(11):  # beyond one digit: numbers, not names, are sorted
        with stage.claim() as attempt:
            pass
    assert attempt.number == 11
    assert [folder.name for folder in attempt.previous] == [str(number) for number in range(10, 0, -1)]


def test_a_failure_is_noted_until_the_next_attempt(stage: Stage) -> None:
    with pytest.raises(TroubleError), stage.claim():
        raise TroubleError("the loss is not finite")
    failure = stage.failure()
    assert failure is not None and failure["message"] == "the loss is not finite"
    assert "TroubleError" in failure["traceback"]
    with stage.claim():
        assert stage.failure() is None


def test_an_interruption_is_no_failure(stage: Stage) -> None:
    for end in (KeyboardInterrupt, SystemExit):
        with pytest.raises(end), stage.claim():
            raise end
        assert stage.failure() is None and stage.holder() is None


def test_a_claimed_stage_cannot_be_claimed(stage: Stage) -> None:
    with stage.claim(), pytest.raises(Held), stage.claim():
        pass
    assert len(stage.attempts()) == 1


def test_dropping_keeps_what_was_asked_for(stage: Stage) -> None:
    for step in ("00000001", "00000002"):
        with stage.claim() as attempt:
            (attempt.folder / "checkpoints" / step).mkdir(parents=True)
            (attempt.folder / "metrics.jsonl").touch()
    attempt.drop("checkpoints", keep=["00000002"])
    left = sorted(str(path.relative_to(stage.folder)) for path in stage.folder.rglob("checkpoints/*"))
    assert left == ["attempts/2/checkpoints/00000002"]
    assert len(list(stage.folder.rglob("metrics.jsonl"))) == 2
