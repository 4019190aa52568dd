import errno
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.store.lease import Held, LeaseLost
from hpdm_core.store.stages import Attempt, Stage, Store, describe


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
    digest = hashlib.sha256(b"weights").hexdigest()
    assert stage.result() == {"steps": 3, "sha256": {"model.safetensors": digest}}
    assert (stage.folder / "model.safetensors").read_text() == "weights"
    assert stage.holder() is None


def test_the_result_is_written_after_the_files(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("hpdm_core.store.stages.publish", crash)
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


def test_stages_of_each_kind_lie_apart(tmp_path: Path) -> None:
    folders = [Store(tmp_path).stage(kind, "abc").folder for kind in ("train", "samples", "evaluations")]
    assert folders == [
        tmp_path / "train" / "abc",
        tmp_path / "samples" / "abc",
        tmp_path / "evaluations" / "abc",
    ]


def test_an_attempt_that_was_deleted_gives_its_number_to_nobody(stage: Stage) -> None:
    for _ in range(3):
        with stage.claim():
            pass
    shutil.rmtree(stage.folder / "attempts" / "2")
    (stage.folder / "attempts" / "notes").mkdir()
    with stage.claim() as attempt:
        assert attempt.number == stage.newest() == 4
    assert [folder.name for folder in attempt.previous] == ["3", "1"]


def test_progress_is_the_newest_attempts(stage: Stage) -> None:
    assert stage.progress() is None
    for step in (5, 2):
        with stage.claim() as attempt:
            attempt.heartbeat({"step": step})
    assert stage.progress() == {"step": 2}


def test_a_log_grows(stage: Stage) -> None:
    with pytest.raises(ValueError, match="bang"), stage.claim() as attempt:
        attempt.log("one")
        attempt.log("two")
        raise ValueError("bang")
    log = (attempt.folder / "log.txt").read_text()
    assert [line.split(" ", 2)[2] for line in log.splitlines()[:2]] == ["one", "two"]
    assert "Traceback" in log and "ValueError: bang" in log


def test_what_was_taken_over_is_not_put_in_place(stage: Stage) -> None:
    with pytest.raises(LeaseLost), stage.claim() as attempt:
        (attempt.folder / "w").write_text("weights")
        (stage.folder / "lease.json").write_text("{}")
        attempt.finish({"steps": 3}, files={"w": "model.safetensors"})
    assert not stage.done and not (stage.folder / "model.safetensors").exists()


def test_a_failure_that_cannot_be_noted_is_still_that_failure(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hpdm_core.store.stages.write_json", full)
    with pytest.raises(TroubleError, match="not finite"), stage.claim() as attempt:
        monkeypatch.setattr(Attempt, "log", full)
        raise TroubleError("the loss is not finite")
    assert stage.failure() is None and attempt.number == 1


def test_all_that_a_process_prints_goes_to_the_log(stage: Stage) -> None:
    code = f"""
import os, sys
from pathlib import Path
from hpdm_core.store.stages import Store
with Store(Path({str(stage.folder.parent.parent)!r})).stage("train", "abc").claim() as attempt:
    attempt.log("before")
    print("lost otherwise", end="")
    attempt.take_output()
    print("printed", flush=True)
    os.write(2, b"from native code\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("lost otherwise", "")
    log = (stage.folder / "attempts" / "1" / "log.txt").read_text()
    assert "before" in log and log.endswith("printed\nfrom native code\n")


def test_errors_are_described_for_people(stage: Stage) -> None:
    full = describe(OSError(errno.ENOSPC, "No space left on device"))
    assert full["passing"] and full["class"] == "OSError"
    bug = describe(ValueError("first line\nC++ stack"))
    assert not bug["passing"] and bug["message"] == "ValueError: first line"
    assert describe(TroubleError("one", "two"))["message"].splitlines() == ["one", "two"]
