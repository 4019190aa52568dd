"""The controller: plans a study's cells, runs them through a backend, and says what became of them.

It keeps no state of its own. What is done is read from the store, what runs from the job folders; so it may
be killed at any moment and started again, and adopts the workers that outlived it.

    results/<study>/   study.yaml  versions.json  journal.log  index.csv  controller.lock  report/
                       jobs/<cell>/{spec.json,job.json,worker.json,error.json,log/}
"""

import contextlib
import csv
import io
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdm_core.cell import Cell, Step
from hpdm_core.errors import HpdmError, TroubleError
from hpdm_core.files import disk_trouble, read_json, write_bytes, write_json
from hpdm_core.plugins.observers import Observers
from hpdm_core.study.backends import Backend, Handle, adopt, end_all
from hpdm_core.study.lease import Held, Lease
from hpdm_core.study.ledger import Ledger, LedgerCell, State
from hpdm_core.study.progress import Display, Row, seconds_left, span
from hpdm_core.study.provenance import versions

__all__ = ["Controller", "Task"]

POLL_SECONDS = 0.25
POLL_SECONDS_PER_JOB = 0.03  # hundreds of jobs on a network file system are asked less often
LOW_DISK_BYTES = 1 << 20


@dataclass(eq=False)
class Task:
    """One cell in the controller's hands."""

    cell: Cell
    folder: Path
    """The job's own: its spec, who runs it, why it failed."""
    state: State = "waiting"
    reason: str = ""
    handle: Handle | None = None
    slot: int = 0
    shared: frozenset[Path] = frozenset()
    """Stages that this job is to make and that another cell might want too."""
    before: dict[Path, int] = field(default_factory=dict)
    """Number of the newest attempt of each missing stage when the command was given."""
    started: float = 0.0
    seconds: float | None = None
    """How long it took in this command."""

    @property
    def entry(self) -> LedgerCell:
        """What the ledger writes down."""
        return LedgerCell(identity=self.cell.identity, arm=self.cell.arm, seed=self.cell.seed)

    @property
    def log(self) -> Path:
        """Where to look: the log of the newest attempt at what is missing, or the job's folder."""
        for step in self.cell.missing():
            attempts = step.stage.attempts()
            if attempts:
                return attempts[-1] / "log.txt"
        return self.folder / "log"


class Controller:
    """Runs ``cells``, whose study has the folder ``folder``, through ``backend``, one writer at a time.

    ``others`` are cells of the study that this command leaves alone (``--only``): their workers are not
    ended. ``source`` is what the folder keeps as study.yaml; ``report`` is called with the folder at the end
    and returns text to show; ``again`` is the command that goes on.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        folder: Path,
        study: str,
        backend: Backend,
        display: Display,
        source: str = "",
        storage: str | None = None,
        others: Sequence[Cell] = (),
        retry_failed: bool = False,
        report: Callable[[Path], str] | None = None,
        again: str = "",
    ) -> None:
        self.folder = folder
        self.study = study
        self.backend = backend
        self.display = display
        self.source = source
        self.storage = storage
        self.retry_failed = retry_failed
        self.report = report
        self.again = again
        self.tasks = [Task(cell, folder / "jobs" / cell.identity) for cell in cells]
        self.others = {cell.identity: cell for cell in others}
        self.trouble = False
        """Whether something went wrong that a person should look at, though the work went on."""

    def run(self) -> int:
        """Run what is missing and return the exit code: 0 all done, 1 trouble, 130 after Ctrl-C.

        Raises `TroubleError` when another controller works on the study, and when the disk fails.
        """
        with disk_trouble(self.folder), self._locked():
            ledger = Ledger(self.folder, study=self.study, storage=self.storage)
            for notice in ledger.notices:
                self.trouble = True
                self.display.line(notice)
            write_bytes(self.folder / "study.yaml", self.source.encode())
            for task in self.tasks[:1]:  # the report tells older results from these
                planned = {**versions(), "plugins": task.cell.plugins.versions()}
                write_json(self.folder / "versions.json", planned)
            self._end_strangers()
            self._plan()
            ledger.sync([(task.entry, task.state, self._work(task)) for task in self.tasks])
            self._write_index()
            try:
                self._work_off(ledger)
            except KeyboardInterrupt:
                self._end_workers(ledger)
                self.display.close()
                return self._interrupted()
            except BaseException:
                self._end_workers(None)
                raise
            finally:
                self.display.close()
            self._finish()
        return 1 if self.trouble or any(task.state != "done" for task in self.tasks) else 0

    # Before

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lease = Lease(self.folder / "controller.lock")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lease)
            except Held as held:
                who = held.holder or "another process"
                raise TroubleError(
                    f"study '{self.study}' in {self.folder} is being run by {who}; one at a time: end that "
                    "one, or wait for it"
                ) from None
            yield

    def _end_strangers(self) -> None:
        """End workers of cells that the study no longer has."""
        wanted = {task.cell.identity for task in self.tasks} | set(self.others)
        jobs = self.folder / "jobs"
        folders = [path for path in jobs.iterdir() if path.name not in wanted] if jobs.is_dir() else []
        running = [handle for folder in folders if (handle := adopt(folder)) is not None]
        if running:
            self.display.line(f"ending {len(running)} workers of cells that the study no longer has")
            end_all(running)

    def _plan(self) -> None:
        for slot, task in enumerate(self.tasks):
            steps = task.cell.missing()
            task.before = {step.stage.folder: step.stage.newest() for step in steps}
            if not steps:
                task.state = "done"
                continue
            handle = adopt(task.folder)
            if handle is not None:
                self._running(task, handle, steps, slot)
                self.display.line(f"{task.cell.name}: its worker outlived the last controller and is adopted")
                continue
            if self.retry_failed:
                continue
            reason = self._failure(task, steps, fresh=False)
            if reason is not None:
                task.state = "failed"
                task.reason = f"{reason} (failed earlier; --retry-failed runs it again)"

    # Meanwhile

    def _work_off(self, ledger: Ledger) -> None:
        self._show()
        while True:
            self._settle(ledger)
            self._launch(ledger)
            self._show()
            if not any(task.state in ("waiting", "running") for task in self.tasks):
                return
            running = sum(task.state == "running" for task in self.tasks)
            time.sleep(POLL_SECONDS + running * POLL_SECONDS_PER_JOB)

    def _settle(self, ledger: Ledger) -> None:
        for task in self.tasks:
            if task.state != "running" or task.handle is None or task.handle.alive():
                continue
            task.handle = None
            task.seconds = time.monotonic() - task.started
            steps = task.cell.missing()
            reason = self._failure(task, steps, fresh=True) if steps else None
            if not steps:
                self._set(ledger, task, "done")
            elif reason is not None:
                self._set(ledger, task, "failed", reason)
            else:
                self._set(ledger, task, "interrupted", self._silence())

    def _launch(self, ledger: Ledger) -> None:
        for task in self.tasks:
            running = [other for other in self.tasks if other.state == "running"]
            if self.backend.slots is not None and len(running) >= self.backend.slots:
                return
            if task.state != "waiting":
                continue
            steps = task.cell.missing()
            if not steps:  # another cell, or another study, has made it meanwhile
                self._set(ledger, task, "done")
                continue
            if any(other.shared & _shared(steps) for other in running):
                continue  # two cells that need one model never train it twice
            reason = self._failure(task, steps, fresh=True)
            if reason is not None:  # the stage that it shares with a cell that has failed
                self._set(ledger, task, "failed", reason)
                continue
            self._start(ledger, task, steps, {other.slot for other in running})

    def _start(self, ledger: Ledger, task: Task, steps: list[Step], taken: set[int]) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        for name in ("error.json", "worker.json", "job.json"):
            (task.folder / name).unlink(missing_ok=True)
        spec = task.folder / "spec.json"
        write_json(spec, task.cell.spec())
        slot = next(number for number in range(len(self.tasks) + 1) if number not in taken)
        self._running(task, None, steps, slot)
        self._set(ledger, task, "running")
        self._show()
        # Inline, this returns when the cell has ended.
        task.handle = self.backend.start(spec, slot=slot)

    def _running(self, task: Task, handle: Handle | None, steps: list[Step], slot: int) -> None:
        task.state = "running"
        task.handle = handle
        task.slot = slot
        task.shared = _shared(steps)
        task.started = time.monotonic()

    def _failure(self, task: Task, steps: Sequence[Step], *, fresh: bool) -> str | None:
        """Return why one of the missing ``steps`` has failed, or None.

        ``fresh``: within this command; with ``--retry-failed`` what was there before does not count.
        """
        found = [(read_json(task.folder / "error.json"), task.state == "waiting")]
        for step in steps:
            old = step.stage.newest() <= task.before.get(step.stage.folder, 0)
            found.append((step.stage.failure(), old))
        for failure, old in found:
            if failure is None:
                continue
            # A full disk is no fault of the cell: the next command goes on without being asked to.
            forgiven = failure.get("passing", False) or (fresh and self.retry_failed)
            if not (old and forgiven):
                return str(failure.get("message", "unknown error"))
        return None

    def _silence(self) -> str:
        """Return what may be behind a worker that ended without a word."""
        if shutil.disk_usage(self.folder).free < LOW_DISK_BYTES:
            return "the disk is full; free some space and give the same command again"
        return "its worker ended without a word (killed, or out of memory); the same command goes on"

    def _set(self, ledger: Ledger, task: Task, state: State, reason: str = "") -> None:
        task.state = state
        task.reason = reason
        ledger.set(task.entry, state, seconds=self._work(task) if state == "done" else 0.0)
        self._write_index()

    def _work(self, task: Task) -> float:
        if task.state != "done":
            return 0.0
        return float(sum(result.get("wall_seconds", 0.0) for result in task.cell.results().values()))

    # Shown and written

    def tick(self) -> None:
        """Show where everything is; an inline backend calls it while it works."""
        self._show()

    def _show(self) -> None:
        rows = []
        for task in self.tasks:
            progress = self._progress(task) if task.state == "running" else None
            rows.append(
                Row(name=task.cell.name, state=task.state, progress=progress, reason=_first_line(task.reason))
            )
        self.display.update(rows, self._summary(rows))

    def _progress(self, task: Task) -> dict[str, Any] | None:
        for step in task.cell.missing():
            # The first missing stage. Unclaimed, its newest heartbeat is that of an attempt that has ended.
            return step.stage.progress() if step.stage.holder() is not None else None
        return None

    def _summary(self, rows: Sequence[Row]) -> str:
        counts = {
            state: sum(row.state == state for row in rows) for state in ("running", "failed", "interrupted")
        }
        done = sum(row.state == "done" for row in rows)
        parts = [f"{done} of {len(rows)} cells done"]
        parts += [f"{count} {state}" for state, count in counts.items() if count]
        left = self._time_left(rows)
        if left is not None:
            parts.append(f"about {span(left)} left")
        return ", ".join(parts)

    def _time_left(self, rows: Sequence[Row]) -> float | None:
        """Estimate from the cells finished in this command; while there are none, from the running stages."""
        waiting = sum(task.state == "waiting" for task in self.tasks)
        running = [task for task in self.tasks if task.state == "running"]
        if not running and not waiting:
            return None
        stage_left = [left for row in rows if (left := seconds_left(row.progress)) is not None]
        taken = [task.seconds for task in self.tasks if task.state == "done" and task.seconds is not None]
        if taken:
            usual = sum(taken) / len(taken)
            now = time.monotonic()
            rest = sum(max(usual - (now - task.started), 0.0) for task in running) + waiting * usual
        elif stage_left and running:
            elapsed = [time.monotonic() - task.started for task in running]
            rest = sum(stage_left) + waiting * (max(stage_left) + max(elapsed))
        else:
            return None
        slots = (
            len(running) if self.backend.slots is None else min(self.backend.slots, len(running) + waiting)
        )
        return float(rest / max(1, slots))

    def _write_index(self) -> None:
        rows = [(task.cell, str(task.state)) for task in self.tasks]
        rows += [(cell, "waiting" if cell.missing() else "done") for cell in self.others.values()]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "seed", "train", "samples", "evaluations", "state"])
        for cell, state in rows:
            keys = cell.keys
            evaluations = ";".join(keys.evaluations)
            writer.writerow([cell.arm, cell.seed, keys.train, keys.samples, evaluations, state])
        write_bytes(self.folder / "index.csv", text.getvalue().encode())

    # After

    def _end_workers(self, ledger: Ledger | None) -> None:
        running = [task for task in self.tasks if task.state == "running"]
        if any(task.handle is not None for task in running):
            self.display.line("ending the workers ...")
        end_all([task.handle for task in running if task.handle is not None])
        for task in running:
            if ledger is None:
                task.state = "interrupted"
            else:
                self._set(ledger, task, "interrupted")

    def _interrupted(self) -> int:
        done = sum(task.state == "done" for task in self.tasks)
        self.display.line(
            f"interrupted: {done} of {len(self.tasks)} cells done, and nothing of the work is lost."
        )
        self.display.line(f"To go on, give the same command again:\n  {self.again}")
        return 130

    def _finish(self) -> None:
        for task in self.tasks:
            if task.state in ("failed", "interrupted"):
                for line in task.reason.splitlines():
                    self.display.line(f"{task.state}: {task.cell.name}: {line} (log: {task.log})")
        if self.report is not None:
            try:
                self.display.line(self.report(self.folder))
            except HpdmError as error:
                self.trouble = True
                for message in error.messages:
                    self.display.line(f"error: report: {message}")
        if self.tasks:
            Observers(self.tasks[0].cell.plugins, None).study_finished(self.folder)


def _shared(steps: Sequence[Step]) -> frozenset[Path]:
    return frozenset(step.stage.folder for step in steps if step.stage.kind != "evaluations")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
