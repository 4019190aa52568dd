"""The worker process: run one cell from its spec file, write a heartbeat meanwhile and at the end why it ended.

On SIGTERM, or on SIGUSR2 (which SLURM sends shortly before a time limit or a preemption), the worker saves a
checkpoint after the current step and exits. In a SLURM job it requeues itself after SIGUSR2 and later resumes at the
step of that checkpoint. This replaces submitit's own SIGUSR2 handler, which would end the cell by an exception and
report every job with a limit of ten minutes or less as timed out.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpdm_core.base import interruption
from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.cell import Cell
from hpdm_core.cell.mark import mark_of
from hpdm_core.store.failures import Cause, TimeLimit
from hpdm_core.store.heartbeat import JobHeartbeat, Progress
from hpdm_core.store.stages import describe

__all__ = ["run_job"]

RESOLUTION_SECONDS = 90.0
"""Tolerance in judging whether a signal came for the time limit: SLURM may send it a minute early, and a worker takes
a while to start."""


def run_job(path: str, progress: Progress | None = None) -> None:
    """Run the cell in the spec file ``path``; this is the whole of a worker process.

    Beside the spec it writes ``worker.json``, ``heartbeat.json`` and at the end ``error.json`` or ``end.json``
    (see `hpdm_core.study.backends.interface`). With ``progress`` it runs in the caller's process and prints there. When
    several processes run one cell together, rank 0 writes these files.
    """
    spec_file = Path(path)
    first = _rank() == 0
    heart = JobHeartbeat(spec_file.parent) if progress is None and first else None
    cell: Cell | None = None
    with interruption.watched(), heart or contextlib.nullcontext():
        try:
            spec = read_json(spec_file)
            if spec is None:
                raise TroubleError(f"{spec_file}: no readable spec of a cell")
            if heart is not None:
                heart.gpus = int(spec.get("gpus", 0))
            _set_environment(spec.get("environment", {}))
            cell = Cell.from_spec(spec)
            with _ended_in_order(cell, heart, spec.get("slurm")), _together(cell):
                cell.run(progress if heart is None else heart.show, own_output=heart is not None)
        except Exception as error:
            said = describe(error, stage=None if cell is None else cell.at)
            file = spec_file.parent / "error.json"
            # A process that failed only because another one is gone must not overwrite that one's error.
            lost = said["kind"] == "lost node"
            told = (read_json(file) or {}).get("kind", "lost node") != "lost node"
            if (lost and told) or (not first and (lost or told)):
                raise
            if heart is not None:
                heart.say("error.json", said)
            else:
                with contextlib.suppress(OSError):
                    write_json(file, said)
            raise


def _rank() -> int:
    """This process's rank among those that run the cell together, before torch.distributed is initialised."""
    # submitit's number for a local job comes first: such a job may have been started within a SLURM allocation.
    names = ("SUBMITIT_LOCAL_GLOBALID", "SLURM_PROCID" if "SLURM_JOB_ID" in os.environ else "RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _together(cell: Cell) -> Iterator[None]:
    """Join the process group of the job, if it has several processes."""
    from hpdm_core.base import distributed

    with distributed.joined(cell.config.runtime.device):
        yield


@contextlib.contextmanager
def _ended_in_order(
    cell: Cell, heart: JobHeartbeat | None, slurm: Mapping[str, Any] | None
) -> Iterator[None]:
    """When a signal ended the work, write why to ``end.json``, and requeue the SLURM job where that is due."""
    begun = mark_of(cell) if heart is not None else None
    try:
        yield
    except interruption.Interrupted as end:
        if heart is None:
            raise
        cause = _cause(end.signum, heart.seconds, slurm)
        word: dict[str, Any] = {"signal": signal.Signals(end.signum).name, "cause": cause, "requeued": False}
        if slurm is None or end.signum != getattr(signal, "SIGUSR2", None):
            heart.say("end.json", word)
            raise
        if cause == "time limit" and mark_of(cell) == begun:
            raise TimeLimit(
                f"the time limit of {float(slurm['limit_seconds']) / 60:.0f} min passed before any step could be "
                "saved; raise backend.time, or make steps shorter (runtime.micro_batch)"
            ) from None
        heart.say("end.json", {**word, "requeued": True})
        if not _requeue():
            heart.say("end.json", word)
        raise


def _cause(signum: int, seconds: float, slurm: Mapping[str, Any] | None) -> Cause | None:
    """Why the signal came, as far as this process can tell; None when only the scheduler can tell."""
    if slurm is None or signum != getattr(signal, "SIGUSR2", None):
        return None
    due = float(slurm["limit_seconds"]) - float(slurm["signal_seconds"]) - RESOLUTION_SECONDS
    return "time limit" if seconds >= due else "preempted"


def _requeue() -> bool:
    number = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        shown = subprocess.run(
            ["scontrol", "requeue", number], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"scontrol requeue {number}: {error}", flush=True)
        return False
    if shown.returncode:
        print(f"scontrol requeue {number}: {shown.stderr.strip()}", flush=True)
    return shown.returncode == 0
