"""The backend local: runs jobs as processes of this machine, in a fixed number of slots.

submitit starts the processes. Its local executor has no queue, gives every job the same GPU, and does not report how
a worker was killed. This module adds slots, GPU ids, cores and a memory limit; a small parent process
(`hpdm_core.study.backends.local_parent`) between submitit and the worker records how the worker ended.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.store.lease import Process
from hpdm_core.study.backends import local_parent as watch
from hpdm_core.study.backends.interface import (
    GRACE_SECONDS,
    Clock,
    Job,
    JobRunner,
    SchedulerStatus,
    SystemClock,
)

__all__ = ["Local", "LocalOptions"]

FOREVER_MIN = 60 * 24 * 3650  # submitit's local executor ends a job after 2 minutes unless told otherwise
GIB = 1 << 30


class LocalOptions(BaseModel):
    """Options of the backend local."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: Annotated[int, Field(gt=0)] = 1
    """Cells that run at a time."""
    gpus: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each slot, in turn; empty leaves it as it is."""
    cpus_per_slot: Annotated[int, Field(gt=0)] | None = None
    """Cores that each slot has for itself; null lets all slots share all cores."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory (GiB) above which a worker is killed and counted as out of memory; null for no limit."""
    min_free_gb: Annotated[float, Field(ge=0)] = 0.0
    """Free memory (GiB) of the machine below which no further cell is started."""


class Local:
    """Runs jobs as processes of this machine, started by submitit, in a fixed number of slots."""

    attached = False
    queued = False
    made_up = False
    grace = GRACE_SECONDS

    def __init__(self, runner: JobRunner, options: LocalOptions, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.gpus = 1 if options.gpus else 0
        self.slots = options.slots
        self._options = options
        self._work = runner.work
        self._held: dict[str, _Worker] = {}

    def check(self) -> None:
        """Raise `InputError` when the slots want more cores than this process has."""
        wanted = (self._options.cpus_per_slot or 0) * self.slots
        if wanted > len(_cores()):
            raise InputError(
                f"backend: {self.slots} slots of {self._options.cpus_per_slot} cores are {wanted}; allowed: at "
                f"most the {len(_cores())} cores that this process may use"
            )

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return the number of free slots; 0 while less than ``min_free_gb`` is free, unless no job runs."""
        free = self.slots - len(under_way)
        wanted = self._options.min_free_gb * GIB
        if under_way and wanted > 0 and _free_bytes() < wanted:
            return 0
        return max(0, free)

    def interval(self, under_way: int) -> float:
        """Return at most 1 s, so that a killed worker is noticed within two seconds."""
        return min(0.25 + 0.03 * under_way, 1.0)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start a process for each job."""
        for job in jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        import submitit

        taken = {worker.slot for worker in self._held.values()}
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        options = self._options
        environment: dict[str, str | None] = {}
        if options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = options.gpus[slot % len(options.gpus)]
        else:  # submitit would hide every GPU
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        spec = read_json(job.spec)
        assert spec is not None, f"{job.spec} was written a moment ago"
        write_json(job.spec, {**spec, "environment": environment, "gpus": self.gpus}, durable=False)
        guard: dict[str, Any] = {}
        if options.memory_gb is not None:
            guard["memory_bytes"] = int(options.memory_gb * GIB)
        if options.cpus_per_slot is not None:
            begin = (slot % self.slots) * options.cpus_per_slot
            guard["cores"] = _cores()[begin : begin + options.cpus_per_slot]
        words = [sys.executable, "-S", "-E", watch.__file__, str(job.folder), json.dumps(guard)]
        executor = submitit.LocalExecutor(
            folder=job.folder / "log", python=shlex.join([*words, sys.executable])
        )
        executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
        submitted = executor.submit(self._work, str(job.spec))
        launcher = Process.of(int(submitted.job_id))
        shown = None if launcher is None else launcher.to_json()  # None: it has ended already
        write_json(job.folder / "job.json", {"launcher": shown, "slot": slot}, durable=False)
        self._held[job.id] = _Worker(job.folder, launcher, slot, submitted)

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """Look at the jobs' processes."""
        return {job.id: self._look(job) for job in jobs}

    def _look(self, job: Job) -> SchedulerStatus:
        worker = self._worker(job)
        if worker is None:
            return SchedulerStatus(phase="over", cause="never started")
        away = worker.elsewhere()
        if away is not None:
            return SchedulerStatus(phase="unknown", word=f"{away} cannot be asked from here")
        if worker.alive():
            return SchedulerStatus(phase="alive")
        self._held.pop(job.id, None)
        said = read_json(job.folder / "exit.json") or {}
        held = said.get("memory_bytes")
        detail = f"its {held / GIB:.2f} GiB were more than memory_gb" if held else ""
        return SchedulerStatus(
            phase="over", cause=said.get("cause"), signal=said.get("signal", ""), detail=detail
        )

    def _worker(self, job: Job) -> "_Worker | None":
        """Return the job's processes, also if an earlier controller started them."""
        if job.id not in self._held:
            data = read_json(job.folder / "job.json")
            if data is None:
                return None
            self._held[job.id] = _Worker(job.folder, Process.read(data.get("launcher")), data.get("slot", 0))
        return self._held[job.id]

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """Send SIGTERM to the workers, or with ``now`` kill them."""
        for job in jobs:
            worker = self._worker(job)
            if worker is not None:
                worker.kill() if now else worker.end()
        return all(worker is None or worker.elsewhere() is None for worker in map(self._worker, jobs))


@dataclass
class _Worker:
    """The launcher process that submitit started, for this or an earlier controller, and the worker below it."""

    folder: Path
    launcher: Process | None
    slot: int
    submitted: Any = None

    def _worker(self) -> Process | None:
        return Process.read(read_json(self.folder / "worker.json"))

    def _processes(self) -> list[Process]:
        found = [process for process in (self._worker(), self.launcher) if process is not None]
        return [process for process in found if process.alive() and process.pid != os.getpid()]

    def elsewhere(self) -> Process | None:
        """Return the process if it belongs to another host, else None."""
        process = self._worker() or self.launcher
        return process if process is not None and process.alive() is None else None

    def alive(self) -> bool:
        if self.submitted is not None:
            self.submitted.done()  # reaps our child process when it has ended
        living = bool(self._processes())
        if not living:
            self.submitted = None  # submitit's object warns if it still exists when Python exits
        return living

    def end(self) -> None:
        # Signal the worker alone: its launcher would give it one second. A worker that has not written worker.json
        # yet is reached through its launcher.
        for process in self._processes()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        found = self._processes()
        # If the worker has not written worker.json yet, the launcher must end it, as it does on SIGINT.
        chosen = signal.SIGINT if found == [self.launcher] and self._worker() is None else signal.SIGKILL
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, chosen)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _free_bytes() -> float:
    """The machine's available memory in bytes; infinite where it cannot be read."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(found, float("inf"))
