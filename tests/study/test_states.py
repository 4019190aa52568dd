"""What an attempt is, from all that can be known of it."""

from typing import Any

import pytest

from hpdm_core.base.errors import DivergedError, TroubleError
from hpdm_core.store.failures import TimeLimit, kind_of
from hpdm_core.store.lease import LeaseLost
from hpdm_core.study.backends.interface import SchedulerStatus
from hpdm_core.study.controller.states import SILENT_SECONDS, UNANSWERED_SECONDS, Evidence, judge

WAITING, ALIVE, OVER = (
    SchedulerStatus(phase="waiting"),
    SchedulerStatus(phase="alive"),
    SchedulerStatus(phase="over"),
)
LOST = SchedulerStatus(phase="over", cause="lost node", certain=False, word="NODE_FAIL")
FORGOTTEN = SchedulerStatus(phase="over", certain=False, word="not in the queue any more")
DEAF = SchedulerStatus(phase="unknown", word="squeue is not on this machine's PATH")
LONG = SILENT_SECONDS + 1
EVER = UNANSWERED_SECONDS + 1


def case(seen: SchedulerStatus, **facts: Any) -> Evidence:
    return Evidence(**{"done": False, "seen": seen, **facts})


@pytest.mark.parametrize(
    ("evidence", "state", "over", "cause"),
    [
        # Results come first, whatever the scheduler says.
        (case(DEAF, done=True), "done", True, None),
        (case(ALIVE, done=True, started=True), "done", True, None),
        (case(LOST, done=True), "done", True, None),
        # Then what the worker wrote.
        (case(OVER, error={"kind": "diverged", "message": "x"}), "failed", True, "diverged"),
        (case(OVER, error={"message": "of an older version"}), "failed", True, "code error"),
        (case(OVER, error={"kind": "nonsense", "message": "x"}), "failed", True, "code error"),
        (case(OVER, error={"kind": "lost node", "message": "closed by peer"}), "failed", True, "lost node"),
        (
            case(
                SchedulerStatus(phase="over", cause="out of memory"),
                error={"kind": "lost node"},
                started=True,
            ),
            "failed",
            True,
            "out of memory",
        ),
        # Waiting and running.
        (case(WAITING), "queued", False, None),
        (case(WAITING, started=True), "interrupted", False, None),
        (case(ALIVE), "queued", False, None),
        (case(ALIVE, started=True), "running", False, None),
        (case(ALIVE, started=True, silent=EVER), "running", False, None),  # suspended, for instance
        # Over.
        (case(OVER), "interrupted", True, "never started"),
        (case(OVER, started=True), "interrupted", True, "killed"),
        (
            case(SchedulerStatus(phase="over", cause="out of memory"), started=True),
            "failed",
            True,
            "out of memory",
        ),
        (case(SchedulerStatus(phase="over", cause="time limit"), started=True), "failed", True, "time limit"),
        (
            case(SchedulerStatus(phase="over", cause="cancelled"), started=True),
            "cancelled",
            True,
            "cancelled",
        ),
        (
            case(SchedulerStatus(phase="over", cause="preempted"), started=True),
            "interrupted",
            True,
            "preempted",
        ),
        (case(OVER, started=True, ended={"cause": "preempted"}), "interrupted", True, "preempted"),
        # A node that went silent: its worker may live on.
        (case(LOST, started=True), "running", False, None),
        (case(LOST, started=True, silent=LONG), "failed", True, "lost node"),
        (case(LOST), "queued", False, None),
        (case(LOST, silent=LONG), "failed", True, "lost node"),
        (case(FORGOTTEN, started=True), "running", False, None),
        (case(FORGOTTEN, started=True, silent=LONG), "failed", True, "lost node"),
        # No answer is no sign of life, and none of death.
        (case(DEAF), "queued", False, None),
        (case(DEAF, started=True, silent=LONG), "running", False, None),
        (case(DEAF, started=True, unanswered=EVER), "running", False, None),  # its heart beats
        (case(DEAF, started=True, silent=LONG, unanswered=EVER), "failed", True, "lost node"),
        (case(DEAF, unanswered=EVER), "failed", True, "lost node"),
        (case(DEAF, started=True, ended={"cause": "preempted", "requeued": True}), "running", False, None),
        (case(DEAF, started=True, ended={"cause": None, "requeued": False}), "interrupted", True, "killed"),
    ],
)
def test_files_first_then_heartbeats_then_the_scheduler(
    evidence: Evidence, state: str, over: bool, cause: str | None
) -> None:
    status = judge(evidence)
    assert (status.state, status.over, status.cause) == (state, over, cause)


def test_people_are_told_the_schedulers_word_and_the_signal() -> None:
    assert "CONFIGURING" in judge(case(SchedulerStatus(phase="waiting", word="CONFIGURING"))).reason
    killed = judge(case(SchedulerStatus(phase="over", word="FAILED", signal="SIGSEGV"), started=True)).reason
    assert "SIGSEGV" in killed and "FAILED" in killed
    assert "squeue is not on this machine's PATH" in judge(case(DEAF, unanswered=EVER)).reason


class OutOfMemoryError(RuntimeError):
    """As torch's own."""


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "code error"),
        (TroubleError("x"), "code error"),
        (DivergedError("training: the loss is not finite"), "diverged"),
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (raised_from(TroubleError("evaluation"), MemoryError()), "out of memory"),
        (OSError(28, "No space left on device"), "full disk"),
        (raised_from(TroubleError("x"), OSError(28, "No space left on device")), "full disk"),
        (LeaseLost("taken over"), "lost node"),
        (TimeLimit("x"), "time limit"),
    ],
)
def test_exceptions_have_their_class_of_failure(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:7"), "lost node"),
        (ConnectionResetError("Connection reset by peer"), "code error"),
    ],
)
def test_another_process_that_is_gone_is_no_error_of_the_code(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
