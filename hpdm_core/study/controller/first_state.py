"""The first state of each cell in a command: decide per cell to skip, start, wait for a running job, or report a
failure.
"""

from collections.abc import Sequence

from hpdm_core.base.files import read_json
from hpdm_core.cell import Step
from hpdm_core.store.failures import Cause
from hpdm_core.study.controller.retries import Outcome, smaller, try_again
from hpdm_core.study.controller.running import RunningJobs
from hpdm_core.study.controller.tasks import Task, jobs_in

__all__ = ["blocked", "plan"]

SETTLED: tuple[Cause, ...] = ("code error", "diverged", "out of memory", "time limit")
"""Causes after which a later command does not retry, unless ``--retry-failed`` is given."""
BLOCKING = ("code error", "diverged", "full disk")
"""Causes for which the failure of a shared stage fails every cell that needs the stage."""


def plan(task: Task, attempts: RunningJobs, *, retry_failed: bool, has_jobs: bool) -> bool:
    """Bring ``task`` to its first state in this command; return whether a job of an earlier command was adopted."""
    jobs = jobs_in(task.folder, task.cell.identity) if has_jobs else []
    task.numbers = jobs[-1].number if jobs else 0
    attempts.spending.add(jobs)
    steps = task.cell.missing()
    if not steps:
        task.state = "done"
        return False
    task.note(steps)
    found = [outcome for job in jobs if (outcome := Outcome.read(job)) is not None]
    spec = (read_json(jobs[-1].spec) if jobs else None) or {}
    task.smaller = dict(spec.get("smaller", {}))
    if jobs and Outcome.read(jobs[-1]) is None:
        seen = attempts.router.poll([jobs[-1]])[jobs[-1].id]
        task.outcomes, task.job = found, jobs[-1]
        if seen.phase != "over" or not seen.certain:
            task.state = "queued"
            attempts.add(task, steps)
            return True
        # It ended while no controller ran: judge it by its files and by what the scheduler still knows.
        task.before = {}
        found.append(attempts.record(task, attempts.ended_unseen(task, steps, seen), steps))
        task.note(steps)
        attempts.drop(task)
    if retry_failed:
        task.forgiven, task.outcomes, task.smaller = True, [], {}
        return False
    task.outcomes = found
    last = found[-1] if found else None
    again = try_again(found)
    if again and last is not None and last.cause == "out of memory":
        less = smaller(spec, last.stage)
        task.smaller.update(less or {})
        again = less is not None
    if last is not None and last.cause in SETTLED and not again:
        _failed_earlier(task, last.cause, last.reason)
    elif last is None or last.cause not in ("out of memory", "time limit"):
        _failed_elsewhere(task, steps)
    return False


def _failed_elsewhere(task: Task, steps: Sequence[Step]) -> None:
    """Fail ``task`` if one of its stages failed before, in this cell or another, unless the disk was at fault."""
    for step in steps:
        failure = step.stage.failure()
        if failure is None or failure.get("passing"):
            continue
        kind = failure.get("kind", "code error")
        if kind in ("code error", "diverged"):
            _failed_earlier(task, kind, str(failure.get("message", "unknown error")))
            return


def _failed_earlier(task: Task, cause: Cause | None, reason: str) -> None:
    task.state, task.cause = "failed", cause
    task.reason = f"{reason} (failed earlier; --retry-failed runs it again)"


def blocked(task: Task, steps: Sequence[Step]) -> tuple[str, Cause] | None:
    """Return message and cause if a missing stage of ``task`` has failed in another cell that shares it, else None."""
    for step in steps:
        failure = step.stage.failure()
        if failure is None or failure.get("kind", "code error") not in BLOCKING:
            continue
        old = step.stage.newest() <= task.before.get(step.stage.folder, 0)
        if not (old and (task.forgiven or failure.get("passing"))):
            return str(failure.get("message", "unknown error")), failure.get("kind", "code error")
    return None
