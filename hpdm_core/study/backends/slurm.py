"""The backend slurm: one SLURM job per cell, submitted in arrays, on a file system that all nodes share.

submitit writes the batch script and starts the worker on each node. This module adds: splitting jobs into arrays
within ``max_pending`` and the cluster's MaxArraySize; a unique name for each array, by which a job is found again if
the controller was killed before it could note the job's number; the state of jobs
(`hpdm_core.study.backends.slurm_queue`); and an environment without the variables of a surrounding allocation.
"""

import contextlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.study.backends.interface import Clock, Job, JobRunner, SchedulerStatus, SystemClock
from hpdm_core.study.backends.slurm_queue import Queue, chunks, outside, run

__all__ = ["Slurm", "SlurmOptions", "minutes"]

SIGNAL_SECONDS = 90
RETRY_SECONDS = 30.0
LIMIT_WORDS = ("job submit limit", "maxsubmitjobs", "maxjobs", "maximum number of jobs")
PASSING_WORDS = (
    "socket timed out",
    "unable to contact",
    "resource temporarily unavailable",
    "slurm temporarily unable",
    "connection refused",
)
MEMORY_WORDS = ("exceeded job memory limit", "exceeded memory limit", "oom-kill", "oom_kill", "out-of-memory")
LOG_BYTES = 8192
DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def minutes(value: Any) -> Any:
    """Return SLURM's ``1-12:00:00`` or ``2:30:00`` as whole minutes, rounded up; numbers as they are."""
    if not isinstance(value, str):
        return value
    found = DURATION.fullmatch(value.strip())
    if found is None:
        raise ValueError("should be minutes, or SLURM's HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, *rest = found.groups()
    numbers = [int(each) for each in rest if each is not None]
    if days is not None or len(numbers) == 3:
        hours, minute, second = [*numbers, 0, 0][:3]
        total = ((int(days or 0) * 24 + hours) * 60 + minute) * 60 + second
    else:  # MINUTES or MINUTES:SECONDS, as sbatch reads it
        minute, second = [*numbers, 0][:2]
        total = minute * 60 + second
    return -(-total // 60)


class SlurmOptions(BaseModel):
    """Options of the backend slurm. Options that are null are left to the cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_pending: Annotated[int, Field(gt=0)] = 64
    """Jobs that are submitted or running at a time."""
    max_running: Annotated[int, Field(gt=0)] | None = None
    """Jobs of one array that run at a time; null for as many as the cluster allows."""
    time: Annotated[int, BeforeValidator(minutes), Field(gt=0)] = 60 * 24
    """Time limit of one job in minutes, or in SLURM's format (``"1-12:00:00"``)."""
    signal_seconds: Annotated[int, Field(gt=0)] | None = None
    """Seconds before the time limit at which a job saves its work and requeues itself; null for 90, or a quarter of
    the time limit if that is less."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    """Nodes not to be used."""
    wckey: str = ""
    """Empty for none; many clusters refuse an unknown one."""
    nodes: Annotated[int, Field(gt=0)] = 1
    """Nodes of one cell; its processes communicate by torch.distributed."""
    tasks_per_node: Annotated[int, Field(gt=0)] = 1
    """Processes of one cell on each node."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    setup: tuple[str, ...] = ()
    """Shell lines before the job, such as ``module load``."""
    srun_args: tuple[str, ...] = ()
    """Further options of srun, such as ``--cpu-bind=none``."""
    additional_parameters: dict[str, str] = Field(default_factory=dict)
    """Any other options of sbatch."""

    @property
    def notice(self) -> int:
        """Seconds before the time limit at which SLURM sends its signal."""
        return self.signal_seconds or min(SIGNAL_SECONDS, self.time * 60 // 4)

    @property
    def processes(self) -> int:
        """Processes that run one cell together."""
        return self.nodes * self.tasks_per_node

    @property
    def gpus(self) -> int:
        """GPUs of one job."""
        return self.nodes * (self.gpus_per_node or _gpus_of(self.gres))


def _gpus_of(gres: str | None) -> int:
    """Return how many GPUs per node ``gres`` requests: 2 for ``gpu:a100:2``."""
    total = 0
    for each in (gres or "").split(","):
        kind, *rest = each.partition("(")[0].split(":")
        if kind in ("gpu", "gres/gpu"):
            total += int(rest[-1]) if rest and rest[-1].isdecimal() else 1
    return total


class Slurm:
    """Runs jobs on a SLURM cluster; see the module's docstring."""

    attached = False
    queued = True
    made_up = False
    grace = 40.0
    """SLURM itself gives a job KillWait seconds (30 by default) to save its work."""

    def __init__(self, runner: JobRunner, options: SlurmOptions, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.gpus = options.gpus
        self.slots = options.max_pending
        self.queue = Queue(clock=self.clock.monotonic)
        self._options = options
        self._work = runner.work
        self._numbers: dict[str, str] = {}
        self.refused = ""
        """Why the cluster took fewer jobs than submitted the last time; empty if this reason was shown before."""
        self._said: set[str] = set()
        self._array_size: int | None = None
        self._not_before = float("-inf")

    def check(self) -> None:
        """Raise `InputError` unless SLURM's controller answers; that its commands are installed is not enough."""
        if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
            raise InputError(
                "backend: 'slurm' needs the commands sinfo and sbatch, which are not on this machine's PATH; "
                "allowed here: inline, local"
            )
        text, problem = run(["sinfo", "--noheader"], seconds=30)
        if text is None:
            said = problem.removeprefix("sinfo: ")
            raise InputError(f"backend: 'slurm' finds no controller: sinfo says: {said}")

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return how many more jobs fit within ``max_pending``; 0 for `RETRY_SECONDS` after sbatch refused a job."""
        if self.clock.monotonic() < self._not_before:
            return 0
        return max(0, self.slots - len(under_way))

    def interval(self, under_way: int) -> float:
        """Return 0.25 to 15 s, longer with more jobs, whose files lie on a network file system."""
        return min(0.25 + 0.03 * under_way, 15.0)

    # Submitting

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs in arrays. Raises `TroubleError` when the cluster refuses such jobs for good."""
        left = list(jobs)
        self.refused = ""
        size = self._largest_array()
        while left:
            now, left = left[:size], left[size:]
            problem = self._submit_array(now)
            if problem is None:
                continue
            if problem not in self._said:
                self.refused = f"sbatch says: {problem}"
                self._said.add(problem)
            if len(now) > 1 and any(words in problem.lower() for words in LIMIT_WORDS):
                size, left = len(now) // 2, now + left  # a limit of the account: submit fewer, the rest later
                continue
            self._not_before = self.clock.monotonic() + RETRY_SECONDS
            if any(words in problem.lower() for words in (*LIMIT_WORDS, *PASSING_WORDS)):
                return
            raise TroubleError(f"sbatch refused the job: {problem}")

    def _submit_array(self, jobs: Sequence[Job]) -> str | None:
        """Submit one array; return why the cluster refused it, or None."""
        import submitit

        name = f"hpdm-{uuid.uuid4().hex[:10]}"
        folder = jobs[0].folder.parents[2] / "slurm" / name
        folder.mkdir(parents=True)
        limits = {"limit_seconds": self._options.time * 60, "signal_seconds": self._options.notice}
        for index, job in enumerate(jobs):
            spec = read_json(job.spec)
            assert spec is not None, f"{job.spec} was written a moment ago"
            told = {"slurm": limits, "gpus": self.gpus, "processes": self._options.processes}
            write_json(job.spec, {**spec, **told}, durable=False)
            # From here on any controller can find the job by its name.
            place = {"slurm": None, "name": name, "index": index if len(jobs) > 1 else None}
            write_json(job.folder / "job.json", {**place, "log": str(folder)}, durable=False)
        frozen = (read_json(jobs[0].spec) or {}).get("code")
        try:
            with _environment_of(outside(os.environ)):
                executor = submitit.SlurmExecutor(folder=folder)
                executor.update_parameters(**self._parameters(name, len(jobs), frozen))
                with executor.batch():
                    submitted = [executor.submit(self._work, str(job.spec)) for job in jobs]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, OSError) as error:
            if self.queue.find(name):  # the cluster accepted the array despite the error
                return None
            for job in jobs:
                (job.folder / "job.json").unlink(missing_ok=True)
            lines = [line for line in str(error).splitlines() if line.strip()]
            said = [line for line in lines if "error" in line.lower()] or lines[-1:]
            return " ".join(said[-2:]).strip() or "no reason given"
        for job, each in zip(jobs, submitted, strict=True):
            known = read_json(job.folder / "job.json") or {}
            write_json(job.folder / "job.json", {**known, "slurm": each.job_id}, durable=False)
        return None

    def _parameters(self, name: str, count: int, frozen: str | None) -> dict[str, Any]:
        options = self._options
        several = options.processes > 1
        setup = [*_paths(frozen), *options.setup]
        if options.cpus_per_task is not None:  # srun stopped inheriting it from sbatch in SLURM 22.05
            setup.append(f"export SRUN_CPUS_PER_TASK={options.cpus_per_task}")
        given = {
            "job_name": name,
            "time": options.time,
            "signal_delay_s": options.notice,
            "stderr_to_stdout": True,
            "nodes": options.nodes,
            "ntasks_per_node": options.tasks_per_node,
            "gpus_per_node": options.gpus_per_node,
            "cpus_per_task": options.cpus_per_task,
            "mem": None if options.mem_gb is None else f"{int(options.mem_gb * 1024)}MB",
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "constraint": options.constraint,
            "gres": options.gres,
            "exclude": options.exclude,
            "wckey": options.wckey,
            "array_parallelism": options.max_running or count,
            "setup": setup,
            # When one process fails, end the others, which would wait for it in a collective operation.
            "srun_args": [*(["--kill-on-bad-exit=1"] if several else []), *options.srun_args] or None,
            "additional_parameters": {"requeue": True, **options.additional_parameters},
        }
        return {key: value for key, value in given.items() if value is not None}

    def _largest_array(self) -> int:
        if self._array_size is None:
            text, _ = run(["scontrol", "show", "config"])
            found = re.search(r"MaxArraySize\s*=\s*(\d+)", text or "")
            # The largest index is one less; 0 forbids arrays.
            self._array_size = max(1, int(found.group(1)) if found else 1000)
        return self._array_size

    # Looking and ending

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """Ask the cluster, at most once in a few seconds (`Queue.seconds`)."""
        numbers: dict[str, str] = {}
        found: dict[str, SchedulerStatus] = {}
        for job in jobs:
            number = self._number(job)
            if isinstance(number, SchedulerStatus):
                found[job.id] = number
            else:
                numbers[job.id] = number
        seen = self.queue.look(set(numbers.values())) if numbers else {}
        for job in jobs:
            if job.id in numbers:
                found[job.id] = _explained(job, numbers[job.id], seen[numbers[job.id]])
        return found

    def _number(self, job: Job) -> str | SchedulerStatus:
        """Return the job's number, also when its folder has vanished since; a `SchedulerStatus` if it has none."""
        if job.id not in self._numbers:
            found = self._find(job)
            if isinstance(found, SchedulerStatus):
                return found
            self._numbers[job.id] = found
        return self._numbers[job.id]

    def _find(self, job: Job) -> str | SchedulerStatus:
        data = read_json(job.folder / "job.json")
        if data is None:
            return SchedulerStatus(phase="over", cause="never started")
        if data.get("slurm"):
            return str(data["slurm"])
        lines = self.queue.find(str(data.get("name")))
        if lines is None:
            return SchedulerStatus(phase="unknown", word=self.queue.problem)
        index = data.get("index")
        for number in lines:
            if (index is None and "_" not in number) or number.endswith(f"_{index}"):
                with contextlib.suppress(OSError):  # a user who runs --status may have no write permission
                    write_json(job.folder / "job.json", {**data, "slurm": number}, durable=False)
                return number
        return SchedulerStatus(phase="over", cause="never started", word="it never reached the queue")

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """Cancel the jobs; SLURM gives running ones KillWait seconds, or with ``now`` none."""
        found = [self._number(job) for job in jobs]
        numbers = [number for number in found if isinstance(number, str)]
        delivered = not any(isinstance(each, SchedulerStatus) and each.phase == "unknown" for each in found)
        for some in chunks(numbers):
            if now:
                run(["scancel", "--signal=KILL", *some])
            text, problem = run(["scancel", *some])
            delivered &= text is not None or "invalid job id" in problem.lower()
        self.queue.ask()
        return delivered


def _explained(job: Job, number: str, seen: SchedulerStatus) -> SchedulerStatus:
    """Find out-of-memory kills in the job's log: without cgroups, SLURM reports such a job as FAILED, and only the
    slurmstepd line in the log names the memory limit.
    """
    if seen.phase != "over" or seen.cause is not None:
        return seen
    folder = Path(str((read_json(job.folder / "job.json") or {}).get("log", job.folder)))
    for path in folder.glob(f"{number}_*_log.out"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace").lower()
            if "slurmstepd" in text and any(words in text for words in MEMORY_WORDS):
                return replace(seen, cause="out of memory")
    return seen


def _paths(frozen: str | None) -> list[str]:
    """Shell lines that make workers import the frozen code, in any working folder."""
    if frozen is None:
        return []
    path = _quoted(f"{frozen}:")
    # Without PYTHONSAFEPATH Python would put the working folder first.
    return [
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={path}${{PYTHONPATH:+$PYTHONPATH:}}{_quoted(str(Path.cwd()))}",
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@contextlib.contextmanager
def _environment_of(wanted: Mapping[str, str]) -> Iterator[None]:
    """Give the processes that the block starts the environment ``wanted``."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
