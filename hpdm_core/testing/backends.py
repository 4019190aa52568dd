"""Contract of backends: how jobs are started, polled and cancelled."""

from __future__ import annotations

import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import write_json
from hpdm_core.store.lease import Process
from hpdm_core.study.backends.interface import Job, JobRunner, SchedulerStatus
from hpdm_core.testing.case import Case, expect

if TYPE_CHECKING:
    from hpdm_core.study.backends.interface import Backend

__all__ = ["BackendCases", "leave_mark", "sleep_long"]

SECONDS = 60.0
"""Seconds (wall-clock) within which a short job has to finish, and a cancelled job has to end."""


def leave_mark(path: str, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Write a file beside the spec ``path``. Most checks use this as their job."""
    write_json(Path(path).with_name("worker.json"), Process.here().to_json())
    Path(path).with_name("mark").write_text("was here")


def sleep_long(path: str, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Write a file that shows that the job has begun, then sleep until it is cancelled."""
    write_json(Path(path).with_name("worker.json"), Process.here().to_json())  # as the worker of a cell does
    Path(path).with_name("mark").write_text("has begun")
    time.sleep(10 * SECONDS)


class BackendCases(Case):
    """``factory(runner: JobRunner, *, ...) -> Backend``.

    Checks that run jobs are skipped if `Backend.check` raises InputError because this machine cannot run them, and for
    a backend with made-up results.
    """

    family: ClassVar[str] = "backends"

    def test_attributes(self) -> None:
        """The attributes gpus, attached, queued, made_up, grace and clock have valid values."""
        backend = self._backend()
        expect(
            isinstance(backend.gpus, int) and backend.gpus >= 0, f"gpus is {backend.gpus!r}, wanted 0 or more"
        )
        for name in ("attached", "queued", "made_up"):
            value = getattr(backend, name)
            expect(isinstance(value, bool), f"{name} is {value!r}, wanted True or False")
        expect(backend.grace > 0, f"grace is {backend.grace!r}, wanted seconds above 0")
        before = backend.clock.monotonic()
        backend.clock.sleep(0.01)
        expect(backend.clock.monotonic() > before, "clock: time does not pass while it is waited for")

    def test_free_slots(self) -> None:
        """Without jobs there is at least one free slot, and each running job reduces the number."""
        backend = self._backend()
        with _jobs(1) as (job,):
            empty, one = backend.free_slots([]), backend.free_slots([job])
        expect(empty >= 1, f"free_slots([]) is {empty}, wanted 1 or more")
        expect(one < empty, f"free_slots is {one} with a job under way, and {empty} with none")
        expect(backend.interval(1) >= 0, "interval: is negative")

    def test_jobs_that_never_started(self) -> None:
        """A job that was never submitted is "over" or "unknown", and cancelling it raises no error."""
        self._runnable(self._backend())
        backend = self._backend()
        with _jobs(2) as jobs:
            seen = backend.poll(jobs)
            expect(
                set(seen) == {job.id for job in jobs}, f"poll answers for {sorted(seen)}, not for every job"
            )
            for status in seen.values():
                expect(isinstance(status, SchedulerStatus), f"poll returns {status!r}, not SchedulerStatus")
                expect(status.phase in ("over", "unknown"), f"a job that never started is {status.phase!r}")
            backend.cancel(jobs)
            backend.cancel(jobs, now=True)

    def test_job_is_run_and_found_again(self) -> None:
        """A job runs and is over afterwards; another backend object finds it by its files alone."""
        backend = self._runnable(self._backend(leave_mark))
        with _jobs(1) as (job,):
            backend.submit([job])
            noted = (job.folder / "job.json").exists()
            expect(noted or backend.attached, "submit wrote no job.json: no later command can find the job")
            _wait(lambda: backend.poll([job])[job.id].phase == "over", "the job is not over")
            expect((job.folder / "mark").exists(), "the job is over, and its work was not done")
            _wait(
                lambda: self._backend().poll([job])[job.id].phase == "over", "another object says otherwise"
            )

    def test_job_is_ended(self) -> None:
        """A running job is "alive", also for another object; ``cancel(now=True)`` ends it, and may be repeated."""
        backend = self._runnable(self._backend(sleep_long))
        if backend.attached:
            raise unittest.SkipTest("jobs run to their end in submit")
        with _jobs(1) as (job,):
            backend.submit([job])
            try:
                _wait((job.folder / "mark").exists, "the job did not begin")
                phase = self._backend().poll([job])[job.id].phase
                expect(phase == "alive", f"a running job is {phase!r} to another object, wanted 'alive'")
            finally:
                delivered = backend.cancel([job], now=True)
            expect(
                delivered is True, f"cancel returned {delivered!r}, wanted True: the request was delivered"
            )
            _wait(lambda: backend.poll([job])[job.id].phase == "over", "an ended job is not over")
            expect(backend.cancel([job]) is True, "cancel complains about a job that is over")

    def _backend(self, work: Callable[..., None] = leave_mark) -> Backend:
        made: Backend = self.make(JobRunner(work=work))
        return made

    def _runnable(self, backend: Backend) -> Backend:
        """Return ``backend``, or skip the check if it cannot run a job on this machine."""
        if backend.made_up:
            raise unittest.SkipTest("its jobs are made up")
        try:
            backend.check()
        except InputError as error:
            raise unittest.SkipTest(f"not on this machine: {error}") from None
        return backend


@contextmanager
def _jobs(count: int) -> Iterator[list[Job]]:
    """Yield jobs with a folder and a spec each."""
    # A process that was killed may still write its last file while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        made = []
        for number in range(count):
            folder = Path(name) / "study" / "jobs" / f"cell{number}" / "1"
            folder.mkdir(parents=True)
            job = Job(cell=f"cell{number}", number=1, folder=folder)
            write_json(job.spec, {"cell": job.cell})
            made.append(job)
        yield made


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        expect(time.monotonic() < deadline, f"{otherwise} after {SECONDS:.0f} s")
        time.sleep(0.05)
