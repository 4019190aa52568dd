"""The backend inline: runs cells one after another in the controller's own process."""

import contextlib
from collections.abc import Mapping, Sequence

from hpdm_core.study.backends.interface import (
    GRACE_SECONDS,
    Clock,
    Job,
    JobRunner,
    SchedulerStatus,
    SystemClock,
)

__all__ = ["Inline"]


class Inline:
    """Runs a job to its end when it is submitted. ``runner.tick`` is called about every second meanwhile."""

    attached = True
    queued = False
    made_up = False
    grace = GRACE_SECONDS

    def __init__(self, runner: JobRunner, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.gpus = 0
        self._runner = runner

    def check(self) -> None:
        """Do nothing: every machine can run cells inline."""

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return 1, or 0 while a job runs."""
        return 1 - len(under_way)

    def interval(self, under_way: int) -> float:
        """Return 0: `submit` has already waited for the jobs."""
        return 0.0

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs to their end. Their errors are in their files already and are not raised."""
        for job in jobs:
            with contextlib.suppress(Exception):
                self._runner.work(str(job.spec), lambda progress: self._runner.tick())

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """Report every job as over."""
        return {job.id: SchedulerStatus(phase="over") for job in jobs}

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """Do nothing: no job runs between two calls of `submit`."""
        return True
