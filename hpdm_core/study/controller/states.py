"""The states of a cell, and the one function, `judge`, that decides the state and why a job ended.

    planned -> queued -> running -> done
                  ^         |  \\-> failed (cause)
                  |         |  \\-> cancelled
                  \\---- interrupted                 (it goes on: in this command or with the next one)

A state is judged from three kinds of evidence, in this order: what the worker has written (results, error.json,
end.json), whether the worker's heartbeat counter moves, and what the scheduler says. None of them is believed alone:
a job that the queue no longer lists but whose heartbeat moves is running; a job that the queue calls running but that
has written its results is done; a queue that does not answer is not evidence that the job is alive.

Clocks of other hosts are never read: a heartbeat is a counter, and silence is measured on the controller's own
monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hpdm_core.store.failures import FAILURES, Cause
from hpdm_core.study.backends.interface import SchedulerStatus

__all__ = ["CLOSED", "OPEN", "Evidence", "JobStatus", "State", "judge"]

State = Literal["planned", "queued", "running", "interrupted", "done", "failed", "cancelled"]

OPEN: tuple[State, ...] = ("planned", "queued", "running")
"""States in which the controller still has to start the cell or wait for its job."""
CLOSED: tuple[State, ...] = ("interrupted", "done", "failed", "cancelled")

SILENT_SECONDS = 60.0
"""A worker that the scheduler calls over without certainty counts as dead after so long without a heartbeat."""
UNANSWERED_SECONDS = 600.0
"""A job without a heartbeat counts as lost after so long without an answer from the scheduler."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of a job at one moment."""

    done: bool
    """Whether every result of the cell exists."""
    started: bool = False
    """Whether its worker has written a heartbeat."""
    error: Mapping[str, Any] | None = None
    """Content of error.json if it failed: ``kind`` (a `Cause`), ``message``, ``passing``."""
    ended: Mapping[str, Any] | None = None
    """Content of end.json if a signal ended it: ``cause``, ``requeued``."""
    silent: float = 0.0
    """Seconds, on the controller's clock, since its heartbeat counter last moved or was first read."""
    unanswered: float = 0.0
    """Seconds, on the controller's clock, for which the scheduler has not answered."""
    seen: SchedulerStatus
    """What the scheduler says."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What the controller concludes of a job. ``over``: the job has ended; unless it is done, ``cause`` says why."""

    state: State
    over: bool = False
    cause: Cause | None = None
    reason: str = ""


def judge(evidence: Evidence) -> JobStatus:
    """Return the status that follows from ``evidence``."""
    seen = evidence.seen
    if evidence.done:
        return JobStatus(state="done", over=True)
    kind = str((evidence.error or {}).get("kind", "code error"))
    # "lost node" from one of several processes means only that another is gone: the scheduler may know why.
    explained = kind == "lost node" and seen.phase == "over" and seen.cause is not None
    if evidence.error is not None and not explained:
        cause: Cause = kind if kind in get_args(Cause) else "code error"  # type: ignore[assignment]
        reason = str(evidence.error.get("message", "unknown error"))
        return JobStatus(state="failed", over=True, cause=cause, reason=reason)
    if seen.phase == "waiting":
        return JobStatus(state="interrupted" if evidence.started else "queued", reason=seen.word)
    if seen.phase == "alive":
        return JobStatus(state="running" if evidence.started else "queued", reason=seen.word)
    recent = evidence.ended is None and evidence.silent < SILENT_SECONDS
    beats = evidence.started and recent
    if seen.phase == "over":
        if not seen.certain and recent:  # it may still run, or be requeued
            return JobStatus(state="running" if evidence.started else "queued", reason=seen.word)
        return _ended(evidence)
    # The scheduler does not answer: wait while the heartbeat moves, and otherwise up to UNANSWERED_SECONDS.
    if evidence.ended is not None and not evidence.ended.get("requeued"):
        return _ended(evidence)
    if beats or evidence.unanswered < UNANSWERED_SECONDS:
        return JobStatus(state="running" if evidence.started else "queued", reason=seen.word)
    minutes = f"{evidence.unanswered / 60:.0f} min"
    return JobStatus(
        state="failed",
        over=True,
        cause="lost node",
        reason=f"no sign of life, and no answer from the scheduler for {minutes} ({seen.word or 'no answer'})",
    )


def _ended(evidence: Evidence) -> JobStatus:
    """Return the status of a job that is over, without results and without an error."""
    seen, ended = evidence.seen, evidence.ended or {}
    said = ended.get("cause")
    cause: Cause = seen.cause or (said if said in get_args(Cause) else None) or "killed"
    if cause == "killed" and not evidence.started:
        cause = "never started"
    if cause == "killed" and seen.phase == "over" and not seen.certain:
        cause = "lost node"
    by = f" by {seen.signal}" if seen.signal else ""
    reason = {
        "out of memory": "ran out of memory",
        "time limit": "reached its time limit",
        "lost node": "its node was lost",
        "preempted": "preempted",
        "never started": "its worker never started",
        "killed": f"its worker exited without reporting a result (killed{by}, or out of memory)",
        "cancelled": "cancelled",
    }.get(cause, cause)
    if seen.word:
        reason += f" [{seen.word}]"
    if seen.detail:
        reason += f": {seen.detail}"
    state: State = "failed" if cause in FAILURES else "cancelled" if cause == "cancelled" else "interrupted"
    return JobStatus(state=state, over=True, cause=cause, reason=reason)
