"""The states of a cell, why an attempt ended, and the one function that decides between them.

    planned -> queued -> running -> done
                  ^         |  \\-> failed (cause)
                  |         |  \\-> cancelled
                  \\---- interrupted                 (it goes on: in this command or with the next one)

A state is judged from evidence of three kinds, in this order: what the worker has written (results, its error,
its last word), whether the worker's heartbeat counter moves, and what the scheduler says. None of them is
believed alone: a job that the queue has forgotten and that still beats is running; a job that the queue calls
running and that has written its results is done; a queue that does not answer is no sign of life.

No clock of another host is ever read: a heartbeat is a counter, and silence is measured on our own monotonic
clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hpdm_core.store.failures import FAILURES, Cause
from hpdm_core.study.backends.interface import SchedulerStatus

__all__ = ["CLOSED", "OPEN", "Evidence", "JobStatus", "State", "judge"]

State = Literal["planned", "queued", "running", "interrupted", "done", "failed", "cancelled"]

OPEN: tuple[State, ...] = ("planned", "queued", "running")
"""States in which the controller still has something to wait for or to do."""
CLOSED: tuple[State, ...] = ("interrupted", "done", "failed", "cancelled")

SILENT_SECONDS = 60.0
"""After so long without a change of its counter a worker whom the scheduler has given up counts as dead."""
UNANSWERED_SECONDS = 600.0
"""After so long without an answer from the scheduler, and without a beat, an attempt counts as lost."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of an attempt at a moment."""

    done: bool
    """Whether every result of the cell is there."""
    started: bool = False
    """Whether its worker has said who it is."""
    error: Mapping[str, Any] | None = None
    """What it wrote when it failed: ``kind`` (a `Cause`), ``message``, ``passing``."""
    ended: Mapping[str, Any] | None = None
    """The worker's last word when it ended otherwise: ``cause``, ``requeued``."""
    silent: float = 0.0
    """Seconds, on our own clock, since its counter last moved or since it was first looked at."""
    unanswered: float = 0.0
    """Seconds, on our own clock, for which the scheduler has not answered."""
    seen: SchedulerStatus


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What an attempt is. ``over``: it is settled, and nothing of it is to be waited for."""

    state: State
    over: bool = False
    cause: Cause | None = None
    reason: str = ""


def judge(evidence: Evidence) -> JobStatus:
    """Return what `evidence` says."""
    seen = evidence.seen
    if evidence.done:
        return JobStatus(state="done", over=True)
    kind = str((evidence.error or {}).get("kind", "code error"))
    # Of several processes one saw that another was gone: the scheduler may know why.
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
        if not seen.certain and recent:  # it may live on, or come back
            return JobStatus(state="running" if evidence.started else "queued", reason=seen.word)
        return _ended(evidence)
    # No answer. A beating worker is at work; a silent one, or a job that waits, is given time.
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
    """What an attempt without results and without an error is, once it is over."""
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
        "killed": f"its worker ended without a word (killed{by}, or out of memory)",
        "cancelled": "cancelled",
    }.get(cause, cause)
    if seen.word:
        reason += f" [{seen.word}]"
    if seen.detail:
        reason += f": {seen.detail}"
    state: State = "failed" if cause in FAILURES else "cancelled" if cause == "cancelled" else "interrupted"
    return JobStatus(state=state, over=True, cause=cause, reason=reason)
