"""Poll and cancel each job through the backend that started it, which may be that of an earlier command."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hpdm_core.base.files import read_json
from hpdm_core.study.backends.interface import Backend, Clock, Job, SchedulerStatus
from hpdm_core.study.controller.retries import Outcome
from hpdm_core.study.controller.tasks import jobs_in

__all__ = ["BackendRouter", "end_jobs", "end_strangers"]

POLL_SECONDS = 0.05

LEGACY = {"launcher": "local", "slurm": "slurm"}
"""Key in job.json -> backend, for jobs of versions before 2026-11-27, whose spec does not name the backend."""


class BackendRouter:
    """Uses ``backend``, called ``name``, for its own jobs. ``other`` builds, by name, the backends of jobs that an
    earlier command started through another one.
    """

    def __init__(self, backend: Backend, *, name: str, other: Callable[[str], Backend]) -> None:
        self._backend = backend
        self._name = name
        self._make = other
        self._others: dict[str, Backend] = {}
        self._names: dict[str, str] = {}

    def own(self, job: Job) -> None:
        """Note that ``job`` is started through this command's backend."""
        self._names[job.id] = self._name

    def of(self, job: Job) -> Backend:
        """Return the backend that can find ``job``. Raises `InputError` where no plugin brings it."""
        if job.id not in self._names:
            self._names[job.id] = _named(job) or self._name
        name = self._names[job.id]
        if name == self._name:
            return self._backend
        if name not in self._others:
            self._others[name] = self._make(name)
        return self._others[name]

    def _grouped(self, jobs: Sequence[Job]) -> list[tuple[Backend, list[Job]]]:
        groups: dict[int, tuple[Backend, list[Job]]] = {}
        for job in jobs:
            backend = self.of(job)
            groups.setdefault(id(backend), (backend, []))[1].append(job)
        return list(groups.values())

    def poll(self, jobs: Sequence[Job]) -> dict[str, SchedulerStatus]:
        """Return job id -> what its scheduler says."""
        found: dict[str, SchedulerStatus] = {}
        for backend, some in self._grouped(jobs):
            found.update(backend.poll(some))
        return found

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """End the jobs; return whether every request was delivered."""
        delivered = [backend.cancel(some, now=now) for backend, some in self._grouped(jobs)]
        return all(delivered)


def end_jobs(router: BackendRouter, jobs: Sequence[Job], *, clock: Clock, grace: float | None = None) -> None:
    """Ask the jobs to end; kill those left after ``grace`` seconds, or at a second Ctrl-C."""
    left = list(jobs)
    if not left:
        return
    if grace is None:
        grace = max(router.of(job).grace for job in left)
    try:
        router.cancel(left)
        left = _wait(router, left, clock, grace)
    except KeyboardInterrupt:
        pass
    if left:
        router.cancel(left, now=True)
        _wait(router, left, clock, grace)


def end_strangers(
    jobs: Path, wanted: Collection[str], router: BackendRouter, *, clock: Clock, say: Callable[[str], None]
) -> None:
    """End the running jobs below the folder ``jobs`` whose cells are not among the ``wanted``."""
    folders = [path for path in jobs.iterdir() if path.name not in wanted]
    newest = [job for path in folders for job in jobs_in(path, path.name)[-1:]]
    candidates = [job for job in newest if Outcome.read(job) is None]
    seen = router.poll(candidates) if candidates else {}
    running = [job for job in candidates if seen[job.id].phase != "over"]
    if running:
        say(f"ending {len(running)} workers of cells that the study no longer has")
        end_jobs(router, running, clock=clock)


def _named(job: Job) -> str:
    """Return the name of the backend of ``job`` from its files, or an empty string."""
    spec = read_json(job.spec) or {}
    if "backend" in spec:
        return str(spec["backend"])
    noted = read_json(job.folder / "job.json") or {}
    return next((name for key, name in LEGACY.items() if key in noted), "")


def _wait(router: BackendRouter, jobs: Sequence[Job], clock: Clock, seconds: float) -> list[Job]:
    deadline = clock.monotonic() + seconds
    left = list(jobs)
    while left and clock.monotonic() < deadline:
        clock.sleep(POLL_SECONDS)
        seen = router.poll(left)
        left = [job for job in left if seen[job.id].phase != "over"]
    return left
