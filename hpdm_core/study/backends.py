"""Where cells run: in this process, in processes of this machine, or on a SLURM cluster.

The interface that backends follow from now on (submit, poll, cancel; attempt ids; an injected clock) stands in
`hpdm_core.study.jobs`, the states and classes of failure in `hpdm_core.study.states`.

A job is a path to a spec file (`hpdm_core.cell.run_cell`). A backend starts jobs and can tell whether one
still lives; whether a cell is done, failed or was interrupted is read from the store, never from a backend.
So a job may be killed, outlive its controller and be adopted by the next one.

submitit starts the processes. What it is not asked: its queue (the local one has none: slots are ours), its
results and its waiting (it waits 15 s for a result file of a process that was killed).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hpdm_core.errors import InputError, TroubleError, did_you_mean
from hpdm_core.files import read_json, write_json
from hpdm_core.study.lease import Process

__all__ = ["BACKENDS", "Backend", "Handle", "adopt", "end_all", "make_backend"]

Job = Callable[..., None]
"""`hpdm_core.cell.run_cell`: takes a spec file's path and, in this process, a function to call with progress.
"""
FOREVER_MIN = 60 * 24 * 3650  # submitit's local executor ends a job after 2 minutes unless told otherwise
GRACE_SECONDS = 8.0


class Handle(Protocol):
    """A job that was started."""

    def alive(self) -> bool:
        """Whether the job still runs or waits to run."""
        ...

    def end(self) -> None:
        """Ask the job to end; returns at once."""
        ...

    def kill(self) -> None:
        """End the job at once, whatever it does."""
        ...


class Backend(Protocol):
    """Starts jobs. ``slots`` is how many may be under way at a time; None for no limit."""

    slots: int | None

    def check(self) -> None:
        """Raise `InputError` when this machine cannot run such jobs; starts nothing."""
        ...

    def start(self, spec: Path, *, slot: int) -> Handle:
        """Start the job whose spec file is ``spec``; its folder is the job's own."""
        ...


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InlineOptions(_Options):
    """Options of the backend inline: none."""


class LocalOptions(_Options):
    """Options of the backend local."""

    slots: Annotated[int, Field(gt=0)] = 1
    """Cells that run at a time."""
    gpus: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES is to be in each slot, in turn; empty leaves it as it is."""


class SlurmOptions(_Options):
    """Options of the backend slurm. What is None is left to the cluster."""

    max_pending: Annotated[int, Field(gt=0)] = 64
    """Jobs that are submitted or running at a time."""
    time: Annotated[int, Field(gt=0)] = 60 * 24
    """Limit of one job in minutes."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    wckey: str = ""
    """Empty for none; many clusters refuse one that they do not know."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    setup: tuple[str, ...] = ()
    """Shell lines before the job, such as ``module load``."""
    srun_args: tuple[str, ...] = ()
    additional_parameters: dict[str, str] = Field(default_factory=dict)
    """Any other option of sbatch."""


class Inline:
    """Cells one after another in this process."""

    slots: int | None = 1

    def __init__(self, options: InlineOptions, *, job: Job, tick: Callable[[], None]) -> None:
        self._job = job
        self._tick = tick

    def check(self) -> None:
        """Always possible."""

    def start(self, spec: Path, *, slot: int) -> Handle:
        """Run the job to its end. What it raises is in its files already."""
        with contextlib.suppress(Exception):
            self._job(str(spec), lambda progress: self._tick())
        return _Ended()


class _Ended:
    def alive(self) -> bool:
        return False

    def end(self) -> None:
        """Nothing to end."""

    def kill(self) -> None:
        """Nothing to kill."""


class Local:
    """Processes of this machine: submitit's, behind our own slots."""

    def __init__(self, options: LocalOptions, *, job: Job) -> None:
        self.slots: int | None = options.slots
        self._options = options
        self._job = job

    def check(self) -> None:
        """Always possible."""

    def start(self, spec: Path, *, slot: int) -> Handle:
        """Start a process for the job."""
        import submitit

        environment: dict[str, str] = {}
        gpus = self._options.gpus
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        elif "CUDA_VISIBLE_DEVICES" in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        _add_environment(spec, environment, unset=() if environment else ("CUDA_VISIBLE_DEVICES",))
        executor = submitit.LocalExecutor(folder=spec.parent / "log")
        executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
        submitted = executor.submit(self._job, str(spec))
        launcher = Process.of(int(submitted.job_id))
        if launcher is not None:  # else it has ended already
            write_json(spec.parent / "job.json", {"launcher": launcher.to_json()}, durable=False)
        return _LocalJob(spec.parent, launcher, submitted)


@dataclass
class _LocalJob:
    """A launcher (submitit's, ours or an earlier controller's) and the worker that it started."""

    folder: Path
    launcher: Process | None
    submitted: Any = None

    def _worker(self) -> Process | None:
        return Process.read(read_json(self.folder / "worker.json"))

    def _processes(self) -> list[Process]:
        found = [process for process in (self._worker(), self.launcher) if process is not None]
        return [process for process in found if process.alive() and process.pid != os.getpid()]

    def alive(self) -> bool:
        if self.submitted is not None:
            self.submitted.done()  # buries our child when it has ended
        living = bool(self._processes())
        if not living:
            self.submitted = None  # submitit's object complains when it is still there as Python ends
        return living

    def end(self) -> None:
        # The worker alone: its launcher would give it one second. A worker that has not said who it is yet is
        # reached through its launcher.
        for process in self._processes()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        found = self._processes()
        # A launcher whose worker has not said who it is must end that worker itself, as it does on SIGINT.
        chosen = signal.SIGINT if found == [self.launcher] and self._worker() is None else signal.SIGKILL
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, chosen)


class Slurm:
    """Jobs of a SLURM cluster, one per cell, on a file system that its nodes share."""

    def __init__(self, options: SlurmOptions, *, job: Job) -> None:
        self.slots: int | None = options.max_pending
        self._options = options
        self._job = job

    def check(self) -> None:
        """Raise `InputError` where no SLURM answers: its commands alone do not mean a cluster."""
        if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
            raise InputError(
                "backend: 'slurm' needs the commands sinfo and sbatch, which are not on this machine's PATH; "
                "allowed here: inline, local"
            )
        try:
            shown = subprocess.run(
                ["sinfo", "--noheader"], capture_output=True, text=True, timeout=30, check=False
            )
            problem = shown.stderr.strip().partition("\n")[0] if shown.returncode else ""
        except subprocess.TimeoutExpired:
            shown, problem = None, "no answer within 30 s"
        if shown is None or shown.returncode:
            raise InputError(f"backend: 'slurm' finds no controller: sinfo says: {problem}")

    def start(self, spec: Path, *, slot: int) -> Handle:
        """Submit the job."""
        import submitit

        options = self._options
        executor = submitit.AutoExecutor(folder=spec.parent / "log", cluster="slurm")
        setup = list(options.setup)
        if options.cpus_per_task is not None:  # srun stopped inheriting it from sbatch in SLURM 22.05
            setup.append(f"export SRUN_CPUS_PER_TASK={options.cpus_per_task}")
        executor.update_parameters(
            name="hpdm",
            timeout_min=options.time,
            stderr_to_stdout=True,
            gpus_per_node=options.gpus_per_node,
            cpus_per_task=options.cpus_per_task,
            mem_gb=options.mem_gb,
            slurm_partition=options.partition,
            slurm_account=options.account,
            slurm_qos=options.qos,
            slurm_constraint=options.constraint,
            slurm_wckey=options.wckey,
            slurm_setup=setup or None,
            slurm_srun_args=list(options.srun_args) or None,
            slurm_additional_parameters=dict(options.additional_parameters) or None,
        )
        try:
            submitted = executor.submit(self._job, str(spec))
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, OSError) as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise TroubleError(f"sbatch refused the job: {''.join(last)}") from error
        write_json(spec.parent / "job.json", {"slurm": submitted.job_id}, durable=False)
        return _SlurmJob(submitted.job_id)


class _SlurmJob:
    """A job of the queue, by its number: squeue while it is there, else over."""

    POLL_SECONDS = 5.0

    def __init__(self, number: str) -> None:
        self.number = number
        self._asked = float("-inf")
        self._alive = True

    def alive(self) -> bool:
        if self._alive and time.monotonic() - self._asked > self.POLL_SECONDS:
            self._asked = time.monotonic()
            self._alive = self._ask()
        return self._alive

    def _ask(self) -> bool:
        command = ["squeue", "--noheader", "--format=%T", "--jobs", self.number]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return True  # no answer is not an answer
        if shown.returncode:
            return "invalid job id" not in shown.stderr.lower()
        over = {
            "",
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "TIMEOUT",
        }
        return any(state.strip() not in over for state in shown.stdout.splitlines())

    def end(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", self.number], capture_output=True, timeout=60, check=False)
        self._asked = float("-inf")

    def kill(self) -> None:
        self.end()


def adopt(folder: Path) -> Handle | None:
    """Return the job of an earlier controller that still runs in the job folder ``folder``, or None."""
    job = read_json(folder / "job.json") or {}
    if "slurm" in job:
        queued = _SlurmJob(str(job["slurm"]))
        return queued if queued.alive() else None
    local = _LocalJob(folder, Process.read(job.get("launcher")))
    return local if local.alive() else None


def end_all(handles: Sequence[Handle], *, grace: float = GRACE_SECONDS) -> None:
    """End jobs: first as Ctrl-C would, and after ``grace`` seconds, or at a second Ctrl-C, for good."""
    left = list(handles)
    try:
        for handle in handles:
            handle.end()
        deadline = time.monotonic() + grace
        while (left := [handle for handle in left if handle.alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
    except KeyboardInterrupt:
        pass
    for handle in left:
        handle.kill()
    deadline = time.monotonic() + grace
    while any(handle.alive() for handle in left) and time.monotonic() < deadline:
        time.sleep(0.05)


BACKENDS: Mapping[str, type[_Options]] = {
    "inline": InlineOptions,
    "local": LocalOptions,
    "slurm": SlurmOptions,
}
"""Name in a study file -> the options that the backend takes."""


def make_backend(
    name: str, options: Mapping[str, Any], *, job: Job, tick: Callable[[], None], slots: int | None = None
) -> Backend:
    """Build the backend ``name`` of `BACKENDS`; ``slots`` overrides how many jobs may be under way at a time.

    ``tick`` is called every second or so by a backend that runs jobs in this process.
    """
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise InputError(f"backend: unknown '{name}'{did_you_mean(name, BACKENDS)}; allowed: {known}")
    checked = BACKENDS[name].model_validate(dict(options))
    made: Backend
    if isinstance(checked, InlineOptions):
        return Inline(checked, job=job, tick=tick)
    if isinstance(checked, LocalOptions):
        made = Local(checked, job=job)
    else:
        assert isinstance(checked, SlurmOptions), f"no backend for {type(checked).__name__}"
        made = Slurm(checked, job=job)
    if slots is not None:
        made.slots = slots
    return made


def _add_environment(spec: Path, environment: Mapping[str, str], *, unset: Sequence[str] = ()) -> None:
    """Write into the spec what the worker's environment is to be: submitit's executor sets its own there."""
    data = read_json(spec)
    assert data is not None, f"{spec} was written a moment ago"
    write_json(spec, {**data, "environment": {**dict.fromkeys(unset), **environment}})
