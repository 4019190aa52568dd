"""The interface between the controller and the backends that run cells: jobs, backends, clocks.

**A job** is one run of a cell's worker. Its id is ``<cell>.<number>``, its folder ``jobs/<cell>/<number>/`` of the
study. Everything that a job writes about itself goes into this folder, so files that an older job still writes are
never mistaken for those of a newer one::

    spec.json       the cell, and the environment of its worker                    (controller)
    job.json        how to find it again: a process, or a number in a queue        (backend, in `submit`)
    worker.json     the process that runs it; written again when it is requeued    (worker)
    heartbeat.json  {"beat": n, "seconds": s, ...}: n grows, s is the worker's monotonic time   (worker)
    error.json      why it failed: ``kind`` is a `hpdm_core.store.failures.Cause`    (worker)
    end.json        why it ended, if a signal ended it and it could save its work  (worker)
    outcome.json    the controller's record of the ended job, written once         (controller)
    log/            what it printed

**A backend** starts jobs, reports what its scheduler says of them, and ends them. It never decides a cell's state:
`hpdm_core.study.controller.states.judge` does, from the files above, the results in the store and the backend's
`SchedulerStatus`. One object serves one controller. It may cache in memory, but must be able to find any job again
from ``job.json`` alone, for the next controller. The controller's whole loop::

    backend.check()                                   # before anything is written
    while work is left:
        seen = backend.poll(under_way)                # one call for all jobs; at most one query to a scheduler
        ... judge each, settle what is over, retry by cause ...
        free = backend.free_slots(under_way)
        backend.submit(next_jobs[:free])              # returns at once, or (inline) when they have ended
        backend.clock.sleep(backend.interval(len(under_way)))

- ``submit`` writes ``job.json`` for each job that it started. When it raises `TroubleError`, jobs without
  ``job.json`` were not started, those with it were.
- ``poll`` returns job id -> `SchedulerStatus` for every given job. It never raises and never blocks for long: when the
  scheduler does not answer, it returns ``SchedulerStatus(phase="unknown")``.
- ``cancel`` asks jobs to end (with a checkpoint); ``now=True`` kills them. It returns without waiting, and ignores jobs
  that are over or were never started. It returns True when the request was delivered.
- ``gpus`` is how many GPUs one job holds, for budgets.

**Clock.** The controller waits and measures time only with ``backend.clock``, also when it judges heartbeats. So a
backend with a virtual clock runs a study of days in seconds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from hpdm_core.store.failures import Cause

__all__ = [
    "GRACE_SECONDS",
    "Backend",
    "Clock",
    "Job",
    "JobRunner",
    "Phase",
    "SchedulerStatus",
    "SystemClock",
    "Work",
]

Work = Callable[..., None]
"""`hpdm_core.study.worker.run_cell.run_job`: takes a spec file's path and, in this process, a function to call with
progress.
"""


Phase = Literal["waiting", "alive", "over", "unknown"]


@dataclass(frozen=True, kw_only=True)
class SchedulerStatus:
    """What a scheduler says of a job.

    ``waiting``: the job will run, but none of its processes runs yet (pending, requeued, configuring). ``alive``: its
    processes run, are suspended or are being ended. ``over``: the scheduler will not run it any more. ``unknown``:
    the scheduler does not answer, or does not know the job and cannot tell why.
    """

    phase: Phase
    word: str = ""
    """The scheduler's own word, to show to the user: ``CONFIGURING``, ``PENDING (Resources)``."""
    cause: Cause | None = None
    """Why it is over, where the scheduler knows."""
    certain: bool = True
    """For ``over``: whether it is known that no process is left. False for a node that stopped responding."""
    signal: str = ""
    """The signal that killed its worker, such as ``SIGKILL``."""
    detail: str = ""
    """More to show to the user, such as the memory that the worker used."""


class Clock(Protocol):
    """Time that only moves forward."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait for ``seconds``."""
        ...


class SystemClock:
    """This machine's clock."""

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """`time.sleep`."""
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a cell's worker; ``number`` counts a cell's jobs from 1, over all commands."""

    cell: str
    """The cell's identity."""
    number: int
    folder: Path

    @cached_property
    def id(self) -> str:
        """``<cell>.<number>``, unique in the study."""
        return f"{self.cell}.{self.number}"

    @property
    def spec(self) -> Path:
        """Its spec file, the only input of a worker."""
        return self.folder / "spec.json"


GRACE_SECONDS = 8.0
"""`Backend.grace` of a backend whose jobs are processes of this machine."""


def _nothing() -> None:
    """The default `JobRunner.tick`: do nothing."""


@dataclass(frozen=True, kw_only=True)
class JobRunner:
    """Passed to a backend: the function that runs one job."""

    work: Work
    """Runs the job whose spec file it is given. A module-level function, which another process imports by its name."""
    tick: Callable[[], None] = _nothing
    """Called about every second by a backend that runs jobs in this process."""


class Backend(Protocol):
    """Starts jobs; see the module's docstring."""

    clock: Clock
    gpus: int
    """GPUs that one job holds."""
    attached: bool
    """Whether jobs end with this process (inline)."""
    queued: bool
    """Whether a scheduler keeps the jobs: then a command may submit them and return (``--detach``), and each job runs
    from a copy of the code as it was when the job was submitted."""
    made_up: bool
    """Whether results are simulated: these go into a folder of their own, never beside real ones."""
    grace: float
    """Seconds that a job gets to save its work after it is asked to end."""

    def check(self) -> None:
        """Raise `InputError` when this machine cannot run such jobs. Starts and writes nothing."""
        ...

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return how many more jobs may be submitted now, while the jobs ``under_way`` wait or run."""
        ...

    def interval(self, under_way: int) -> float:
        """Return the seconds to wait before the controller's next round, with ``under_way`` jobs."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start the jobs. Raises `TroubleError` when the scheduler refuses."""
        ...

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """Return job id -> what the scheduler says, for each of ``jobs``."""
        ...

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """End the jobs; return whether the request was delivered."""
        ...
