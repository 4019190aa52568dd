"""The jobs under way: collects what is known of each, judges its state, and records its outcome."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from hpdm_core.base.files import read_json, write_json
from hpdm_core.cell import Step
from hpdm_core.cell.mark import mark_of
from hpdm_core.store.lease import Watch
from hpdm_core.study.backends.interface import Clock, Job, SchedulerStatus
from hpdm_core.study.controller.budget import Spending
from hpdm_core.study.controller.retries import Outcome
from hpdm_core.study.controller.router import BackendRouter
from hpdm_core.study.controller.states import Evidence, JobStatus, judge
from hpdm_core.study.controller.tasks import Task, last_lines, shared_stages

__all__ = ["RunningJobs"]

LOW_DISK_BYTES = 1 << 20
FULL_DISK = "the disk is full; free some space and give the same command again"
LINGER_SECONDS = 30.0
"""If a worker's heartbeat has stopped for so long, its results are looked at although its process still exists."""


class RunningJobs:
    """Jobs under way, by job id. Silence is measured on ``clock``; heartbeats are counted in ``spending``."""

    def __init__(self, router: BackendRouter, *, clock: Clock, spending: Spending) -> None:
        self.router = router
        self.clock = clock
        self.spending = spending
        self.tasks: dict[str, Task] = {}
        self.progress: dict[Task, Mapping[str, Any]] = {}
        """The newest heartbeat of each task."""
        self._watch = Watch(clock.monotonic)
        self._unanswered: dict[str, float] = {}

    def jobs(self) -> list[Job]:
        """Return the jobs under way."""
        return [task.job for task in self.tasks.values() if task.job is not None]

    def add(self, task: Task, steps: Sequence[Step]) -> None:
        """Add ``task``, whose job is to compute ``steps``."""
        assert task.job is not None, f"{task.cell.name} has a job"
        self.tasks[task.job.id] = task
        task.shared = shared_stages(steps)
        task.started = self.clock.monotonic()

    def drop(self, task: Task) -> None:
        """Remove ``task``, whose job is over."""
        assert task.job is not None, f"{task.cell.name} has a job"
        self.tasks.pop(task.job.id, None)
        self._unanswered.pop(task.job.id, None)
        self._watch.forget(task.job.id)
        self.progress.pop(task, None)
        task.job = None

    def judged(self, task: Task, seen: SchedulerStatus) -> JobStatus:
        """Return the status of the job of ``task``, given what its scheduler says."""
        assert task.job is not None, f"{task.cell.name} has a job"
        now = self.clock.monotonic()
        files = self._files(task)
        if seen.phase == "unknown":
            unanswered = now - self._unanswered.setdefault(task.job.id, now)
        else:
            unanswered = 0.0
            self._unanswered.pop(task.job.id, None)
        # Results are many files: look at them only when there is a sign that the job has ended.
        look = seen.phase == "over" or files["silent"] > LINGER_SECONDS or files["ended"] is not None
        steps = task.cell.missing() if look else []
        done = look and not steps
        error = task.error(steps) if look and not done else None
        if seen.phase == "waiting":
            error = None  # requeued: the error is from before
        return judge(Evidence(done=done, error=error, unanswered=unanswered, seen=seen, **files))

    def ended_unseen(self, task: Task, steps: Sequence[Step], seen: SchedulerStatus) -> JobStatus:
        """Return the status of a job that ended while there was no controller."""
        return judge(Evidence(done=False, error=task.error(steps), seen=seen, **self._files(task)))

    def _files(self, task: Task) -> dict[str, Any]:
        """Return what the job's own files say: started, silent, ended (see `Evidence`)."""
        job = task.job
        assert job is not None, f"{task.cell.name} has a job"
        beat = read_json(job.folder / "heartbeat.json")
        if beat is not None:
            self.progress[task] = beat
            self.spending.note(job, beat)
        silent = self._watch.silent(job.id, None if beat is None else (beat.get("born"), beat.get("beat")))
        return {"started": beat is not None, "silent": silent, "ended": read_json(job.folder / "end.json")}

    def settle(self, task: Task, status: JobStatus, steps: Sequence[Step]) -> tuple[JobStatus, Outcome]:
        """Close the job of ``task``, with ``steps`` still missing; return its final status and its outcome."""
        if task.pruned and status.state != "done":
            status = JobStatus(state="cancelled", over=True, cause="pruned", reason=task.pruned)
        if status.cause == "killed":
            task.tail = last_lines(task.log, task.job)
            if shutil.disk_usage(task.folder).free < LOW_DISK_BYTES:
                status = JobStatus(state="interrupted", over=True, cause="full disk", reason=FULL_DISK)
        task.seconds = self.clock.monotonic() - task.started
        outcome = self.record(task, status, steps)
        self.drop(task)
        return status, outcome

    def record(self, task: Task, status: JobStatus, steps: Sequence[Step]) -> Outcome:
        """Write the outcome of the job into its folder, and return it."""
        job = task.job
        assert job is not None, f"{task.cell.name} has a job"
        said = (task.error(steps) or {}).get("stage")
        outcome = Outcome(
            state=status.state,
            cause=status.cause,
            reason=status.reason,
            begun=task.begun or list((read_json(job.spec) or {}).get("begun", [])),
            reached=mark_of(task.cell) if steps else [],
            # A killed job reports no stage: it was at the first missing one, since stages run in order.
            stage=said or (steps[0].stage.kind if steps else None),
            smaller=task.smaller,
        )
        write_json(job.folder / "outcome.json", {**outcome.to_json(), "tail": task.tail}, durable=False)
        return outcome
