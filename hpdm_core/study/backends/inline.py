"""The backend inline: cells one after another in the controller's own process."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from hpdm_core.study.backends.interface import Clock, Job, SchedulerStatus, SystemClock

__all__ = ["Inline", "InlineOptions", "Work"]

Work = Callable[..., None]
"""`hpdm_core.study.worker.run_cell.run_job`: takes a spec file's path and, in this process, a function to call with
progress.
"""


class InlineOptions(BaseModel):
    """Options of the backend inline: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Inline:
    """Runs a job to its end when it is submitted. ``tick`` is called about every second meanwhile."""

    attached = True

    def __init__(
        self, options: InlineOptions, *, work: Work, tick: Callable[[], None], clock: Clock | None = None
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self.gpus = 0
        self._work = work
        self._tick = tick

    def check(self) -> None:
        """Always possible."""

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """One at a time."""
        return 1 - len(under_way)

    def interval(self, under_way: int) -> float:
        """Nothing is to be waited for."""
        return 0.0

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run the jobs to their end. What they raise is in their files already."""
        for job in jobs:
            with contextlib.suppress(Exception):
                self._work(str(job.spec), lambda progress: self._tick())

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """All are over."""
        return {job.id: SchedulerStatus(phase="over") for job in jobs}

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """Nothing to end."""
        return True
