"""Jobs that another controller started, perhaps through another backend: each is asked through its own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from hpdm_core.base.files import read_json
from hpdm_core.study.backends.interface import Backend, Clock, Job, SchedulerStatus
from hpdm_core.study.backends.local import Local, LocalOptions
from hpdm_core.study.backends.slurm import Slurm, SlurmOptions
from hpdm_core.study.controller.retries import Outcome
from hpdm_core.study.controller.tasks import jobs_in

__all__ = ["BackendRouter", "end_jobs", "end_strangers"]

GRACE_SECONDS = 8.0
SLURM_GRACE_SECONDS = 40.0
"""SLURM itself gives a job KillWait seconds (30 where nobody changed it) to save its work."""
POLL_SECONDS = 0.05


def _no_work(path: str) -> None:
    raise AssertionError(f"{path}: nothing is started through another backend")


MAKERS: Mapping[str, Callable[[], Backend]] = {
    "launcher": lambda: Local(LocalOptions(), work=_no_work),
    "slurm": lambda: Slurm(SlurmOptions(), work=_no_work),
}
"""What a job.json holds -> a backend that understands it."""
KINDS: Mapping[str, type[Backend]] = {"launcher": Local, "slurm": Slurm}


class BackendRouter:
    """``backend`` for its own jobs, and others for jobs that an earlier command started otherwise."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._others: dict[str, Backend] = {}
        self._kinds: dict[str, str] = {}

    def of(self, job: Job) -> Backend:
        """Return the backend that can find ``job``."""
        kind = self._kinds.get(job.id)
        if kind is None:
            data = read_json(job.folder / "job.json")
            kind = next((name for name in KINDS if name in (data or {})), "")
            if data is not None:  # it is written once, by the backend that starts the job
                self._kinds[job.id] = kind
        if not kind or isinstance(self._backend, KINDS[kind]):
            return self._backend
        if kind not in self._others:
            self._others[kind] = MAKERS[kind]()
        return self._others[kind]

    def _grouped(self, jobs: Sequence[Job]) -> list[tuple[Backend, list[Job]]]:
        if type(self._backend) not in KINDS.values() and not self._others:
            foreign = [job for job in jobs if self.of(job) is not self._backend]
            if not foreign:
                return [(self._backend, list(jobs))]
        groups: dict[int, tuple[Backend, list[Job]]] = {}
        for job in jobs:
            backend = self.of(job)
            groups.setdefault(id(backend), (backend, []))[1].append(job)
        return list(groups.values())

    def poll(self, jobs: Sequence[Job]) -> dict[str, SchedulerStatus]:
        """Return job id -> what its scheduler knows."""
        found: dict[str, SchedulerStatus] = {}
        for backend, some in self._grouped(jobs):
            found.update(backend.poll(some))
        return found

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """End the jobs; return whether every request was delivered."""
        delivered = [backend.cancel(some, now=now) for backend, some in self._grouped(jobs)]
        return all(delivered)


def end_jobs(router: BackendRouter, jobs: Sequence[Job], *, clock: Clock, grace: float | None = None) -> None:
    """End jobs: first as Ctrl-C would, and after ``grace`` seconds, or at a second Ctrl-C, for good."""
    left = list(jobs)
    if not left:
        return
    if grace is None:
        clustered = any(isinstance(router.of(job), Slurm) for job in left)
        grace = SLURM_GRACE_SECONDS if clustered else GRACE_SECONDS
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
    """End what runs below the folder ``jobs`` for cells that are not among the ``wanted``."""
    folders = [path for path in jobs.iterdir() if path.name not in wanted]
    newest = [job for path in folders for job in jobs_in(path, path.name)[-1:]]
    candidates = [job for job in newest if Outcome.read(job) is None]
    seen = router.poll(candidates) if candidates else {}
    running = [job for job in candidates if seen[job.id].phase != "over"]
    if running:
        say(f"ending {len(running)} workers of cells that the study no longer has")
        end_jobs(router, running, clock=clock)


def _wait(router: BackendRouter, jobs: Sequence[Job], clock: Clock, seconds: float) -> list[Job]:
    deadline = clock.monotonic() + seconds
    left = list(jobs)
    while left and clock.monotonic() < deadline:
        clock.sleep(POLL_SECONDS)
        seen = router.poll(left)
        left = [job for job in left if seen[job.id].phase != "over"]
    return left
