"""``--status`` and ``--cancel``: show or end a study, from any machine that can read its folder."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hpdm_core.base.errors import HpdmError, TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.cell import Cell
from hpdm_core.store.lease import Lease
from hpdm_core.study.backends.interface import Backend, Job, SchedulerStatus, SystemClock
from hpdm_core.study.controller.controller import CANCEL
from hpdm_core.study.controller.display import loss_text, seconds_left, span, step_text
from hpdm_core.study.controller.overview import summary
from hpdm_core.study.controller.retries import Outcome
from hpdm_core.study.controller.router import BackendRouter, end_jobs
from hpdm_core.study.controller.states import Evidence, State, judge
from hpdm_core.study.controller.tasks import Task, jobs_in
from hpdm_core.study.ledger.lock import LOCK, locked

__all__ = ["begun_cells", "cancel_study", "status_of"]

CANCEL_SECONDS = 120.0
POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The state of one cell according to its files and its scheduler. ``attempts``: the number of its jobs."""

    state: State
    reason: str = ""
    attempts: int = 0
    progress: Mapping[str, Any] | None = None


def status_of(cells: Sequence[Cell], folder: Path, other: Callable[[str], Backend]) -> str:
    """Return a table of the states of ``cells``, whose study has the folder ``folder``. Writes nothing.

    ``other`` builds a backend by its name, to poll its jobs.
    """
    found = _standings(cells, folder, _router(other))
    rows = []
    for cell, standing in zip(cells, found, strict=True):
        shown = standing.progress if standing.state in ("running", "interrupted") else None
        progress = shown or {}
        rows.append(
            {
                "cell": cell.name,
                "state": standing.state,
                "stage": progress.get("stage", ""),
                "step": step_text(progress),
                "loss": loss_text(progress),
                "time left": span(seconds_left(progress)),
                "jobs": standing.attempts or "",
                "": standing.reason.partition("\n")[0],
            }
        )
    holder = Lease.holder(folder / LOCK)
    who = f"run by {holder}" if holder is not None else "no controller is at work"
    return "\n".join(
        [
            tabulate(rows, headers="keys", disable_numparse=True),
            f"{summary(Counter(standing.state for standing in found), len(found))}; {who}",
        ]
    )


def begun_cells(folder: Path) -> list[Cell]:
    """Return the cells that have a job in the study's ``folder``, oldest first.

    The cells of a search can be found in no other way. A cell whose data, plugins or schema version have changed since
    is left out.
    """
    found = []
    for place in sorted((folder / "jobs").glob("*")):
        jobs = jobs_in(place, place.name)
        spec = read_json(jobs[-1].spec) if jobs else None
        if spec is not None:
            with contextlib.suppress(HpdmError, FileNotFoundError):
                found.append((jobs[0].spec.stat().st_mtime, Cell.from_spec(spec)))
    return [cell for _, cell in sorted(found, key=lambda each: each[0])]


def _standings(cells: Sequence[Cell], folder: Path, router: BackendRouter) -> list[Standing]:
    jobs = {cell.identity: jobs_in(folder / "jobs" / cell.identity, cell.identity) for cell in cells}
    latest = [made[-1] for made in jobs.values() if made]
    open_jobs = [job for job in latest if Outcome.read(job) is None]
    seen = router.poll(open_jobs) if open_jobs else {}
    return [_standing(cell, folder, jobs[cell.identity], seen) for cell in cells]


def _standing(cell: Cell, folder: Path, jobs: Sequence[Job], seen: Mapping[str, SchedulerStatus]) -> Standing:
    steps = cell.missing()
    count = len(jobs)
    if not steps:
        return Standing(state="done", attempts=count)
    if not jobs:
        failures = [failure for step in steps if (failure := step.stage.failure()) is not None]
        if failures:
            return Standing(state="failed", reason=str(failures[0].get("message", "")))
        return Standing(state="planned")
    job = jobs[-1]
    outcome = Outcome.read(job)
    if outcome is not None:
        state: Any = outcome.state
        return Standing(state=state, reason=outcome.reason, attempts=count)
    beat = read_json(job.folder / "heartbeat.json")
    look = seen[job.id].phase == "over"
    task = Task(cell, folder / "jobs" / cell.identity, job=job)
    status = judge(
        Evidence(
            done=False,
            started=beat is not None,
            error=task.error(steps) if look else None,
            ended=read_json(job.folder / "end.json"),
            seen=seen[job.id],
        )
    )
    return Standing(state=status.state, reason=status.reason, attempts=count, progress=beat)


def _router(other: Callable[[str], Backend]) -> BackendRouter:
    """Return a router that finds each job's backend from the job's files; it starts nothing."""
    return BackendRouter(other("inline"), name="inline", other=other)


def cancel_study(
    study: str, folder: Path, *, other: Callable[[str], Backend], say: Callable[[str], None]
) -> int:
    """End everything that runs or waits for ``study`` and return 0.

    A running controller is asked to do it; without one it is done here, under the controller's lock. Raises
    `TroubleError` when the controller does not answer.
    """
    if not folder.is_dir():
        say(f"study '{study}' has no folder {folder}: nothing runs")
        return 0
    deadline = time.monotonic() + CANCEL_SECONDS
    asked = None
    write_json(folder / CANCEL, {"cancel": True})
    while (holder := Lease.holder(folder / LOCK)) is not None:
        if asked is None:
            say(f"asking {holder} to cancel study '{study}' ...")
        asked = holder
        if time.monotonic() > deadline:
            raise TroubleError(
                f"study '{study}': {holder} does not answer; if it is dead, its lock is free in two minutes: "
                "give the command again then"
            )
        time.sleep(POLL_SECONDS)
    if asked is not None and not (folder / CANCEL).exists():
        say(f"study '{study}' is cancelled")
        return 0
    with locked(folder, study, clock=SystemClock(), say=say):
        count = _end_all(folder, _router(other))
        with contextlib.suppress(FileNotFoundError):
            (folder / CANCEL).unlink()
    say(f"study '{study}': {count} jobs cancelled; what is done is kept, the same command goes on")
    return 0


def _end_all(folder: Path, router: BackendRouter) -> int:
    jobs = [job for path in sorted((folder / "jobs").glob("*")) for job in jobs_in(path, path.name)[-1:]]
    jobs = [job for job in jobs if Outcome.read(job) is None]
    if not jobs:
        return 0
    seen = router.poll(jobs)
    running = [job for job in jobs if seen[job.id].phase != "over"]
    end_jobs(router, running, clock=SystemClock())
    for job in running:
        outcome = Outcome(state="cancelled", cause="cancelled", reason="cancelled", begun=[], reached=[])
        write_json(job.folder / "outcome.json", outcome.to_json(), durable=False)
    return len(running)
