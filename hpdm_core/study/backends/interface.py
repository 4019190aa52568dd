"""The interface between the controller and what runs cells: jobs, backends, clocks, planners.

**A job** is one attempt at one cell. Its id is ``<cell>.<number>``, its folder ``jobs/<cell>/<number>/`` of the
study. Whatever an attempt writes about itself goes there, so nothing that an older attempt still writes is ever
read once there is a newer one::

    spec.json       the cell, and what its worker's environment is to be           (controller)
    job.json        how to find it again: a process, or a number in a queue        (backend, in `submit`)
    worker.json     the process that runs it; written again when it is requeued    (worker)
    heartbeat.json  {"beat": n, "seconds": s, ...}: n grows, s is the worker's monotonic time   (worker)
    error.json      why it failed: ``kind`` is a `hpdm_core.store.failures.Cause`    (worker)
    end.json        its last word when it ended in good order                      (worker)
    outcome.json    what the controller made of it, once                           (controller)
    log/            what it printed

**A backend** starts jobs, says what its scheduler knows of them, and ends them. It never decides a state: that
is `hpdm_core.study.controller.states.judge`, from the files above, the results in the store and the backend's
`SchedulerStatus`. One object serves one controller; it may keep what it knows in memory, but must find any job again
from ``job.json`` alone, for the next controller. The controller's loop, in full::

    backend.check()                                   # before anything is written
    while work is left:
        seen = backend.poll(under_way)                # one call for all; at most one question to a scheduler
        ... judge each, settle what is over, retry by cause ...
        free = backend.free_slots(under_way)
        backend.submit(next_jobs[:free])              # returns at once, or (inline) when they have ended
        backend.clock.sleep(backend.interval(len(under_way)))

- ``submit`` writes ``job.json`` for each job that it started. When it raises `TroubleError`, jobs without
  ``job.json`` were not started, those with it were.
- ``poll`` returns job id -> `SchedulerStatus` for every job that it is asked for. It never raises and never blocks for
  long: no answer is ``SchedulerStatus(phase="unknown")``.
- ``cancel`` asks jobs to end (with a checkpoint); ``now=True`` ends them whatever they do. It returns without
  waiting; a job that is over, or was never started, is nothing to complain about. True when the request was
  delivered.
- ``gpus`` is how many GPUs one job holds, for budgets.

**Clock.** Everything in the controller that waits or measures uses ``backend.clock``, so a backend with a
virtual clock runs a study of days in seconds. Heartbeats of jobs are judged on that clock too.
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
    """What a scheduler says of an attempt.

    ``waiting``: it is to run, and no process of it does (pending, requeued, configuring). ``alive``: processes
    of it run, are suspended or are being ended. ``over``: the scheduler will not run it any more. ``unknown``:
    no answer, or it has never heard of it and cannot tell.
    """

    phase: Phase
    word: str = ""
    """The scheduler's own word, for people: ``CONFIGURING``, ``PENDING (Resources)``."""
    cause: Cause | None = None
    """Why it is over, where the scheduler knows."""
    certain: bool = True
    """Over: whether it is known that no process is left. False for a node that went silent."""
    signal: str = ""
    """What its worker was killed by, such as ``SIGKILL``."""
    detail: str = ""
    """More for people, such as the worker's last lines."""


class Clock(Protocol):
    """Time that only moves forward."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        ...


class SystemClock:
    """This machine's."""

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """`time.sleep`."""
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at one cell; ``number`` counts a cell's attempts from 1, over all commands."""

    cell: str
    """The cell's identity."""
    number: int
    folder: Path

    @cached_property
    def id(self) -> str:
        """Unique in the study."""
        return f"{self.cell}.{self.number}"

    @property
    def spec(self) -> Path:
        """Its spec file, all that a worker is given."""
        return self.folder / "spec.json"


GRACE_SECONDS = 8.0
"""For `Backend.grace`, where a job is a process of this machine."""


def _nothing() -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, kw_only=True)
class JobRunner:
    """What a backend is handed: how one job is run."""

    work: Work
    """Runs the job whose spec file it is given. A function of a module: another process imports it by its name."""
    tick: Callable[[], None] = _nothing
    """Called about every second by a backend that runs jobs in this process."""


class Backend(Protocol):
    """Starts jobs; see the module's text."""

    clock: Clock
    gpus: int
    """GPUs that one job holds."""
    attached: bool
    """Whether jobs end with this process (inline)."""
    queued: bool
    """Whether a scheduler of its own keeps the jobs: a command may submit them and go (``--detach``), and each job
    runs from a copy of the code, as it was when it was submitted."""
    made_up: bool
    """Whether results are made up: they go into a folder of their own, never beside real ones."""
    grace: float
    """Seconds that a job which is asked to end gets to save its work."""

    def check(self) -> None:
        """Raise `InputError` when this machine cannot run such jobs; starts and writes nothing."""
        ...

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return how many more jobs may be submitted now, while ``under_way`` are."""
        ...

    def interval(self, under_way: int) -> float:
        """Return the seconds until the next round is worth its cost."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start the jobs. Raises `TroubleError` when the scheduler refuses."""
        ...

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """Return job id -> what the scheduler knows, for each of ``jobs``."""
        ...

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """End the jobs; return whether the request was delivered."""
        ...
