"""The controller: plans a study's cells, runs them through a backend, and reports what became of them.

It needs no state of its own: it reads from the store what is done, and from the job folders what runs. So it may be
killed at any moment and started again; it then adopts the jobs that still run.

    results/<study>/   study.yaml  versions.json  journal.log  index.csv  controller.lock  report/
                       jobs/<cell>/<number>/   code/<hash>/   slurm/<array>/
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence

from hpdm_core.base.errors import HpdmError, TroubleError
from hpdm_core.base.files import read_json, write_bytes, write_json
from hpdm_core.cell import Step
from hpdm_core.plugins.observers import Observers
from hpdm_core.store.failures import Cause
from hpdm_core.store.lease import LeaseLost
from hpdm_core.store.provenance import versions
from hpdm_core.study.backends.interface import Backend, Job, SchedulerStatus
from hpdm_core.study.controller.budget import Spending
from hpdm_core.study.controller.display import Display
from hpdm_core.study.controller.first_state import blocked, plan
from hpdm_core.study.controller.overview import Overview, detached, interrupted, shortfalls
from hpdm_core.study.controller.planner import Planner
from hpdm_core.study.controller.retries import Outcome, pause, refusal, smaller, told, try_again
from hpdm_core.study.controller.router import BackendRouter, end_jobs, end_strangers
from hpdm_core.study.controller.running import RunningJobs
from hpdm_core.study.controller.states import OPEN, JobStatus, State
from hpdm_core.study.controller.study_run import StudyRun
from hpdm_core.study.controller.tasks import Task, shared_stages
from hpdm_core.study.ledger.ledger import Ledger
from hpdm_core.study.ledger.lock import folder_trouble, locked

__all__ = ["CANCEL", "Controller"]

CANCEL = "cancel.json"
"""A file of this name in a study's folder asks its controller to cancel everything."""


class Controller:
    """Runs the cells of ``study`` through ``backend``. It alone writes to the study's folder."""

    def __init__(self, study: StudyRun, *, backend: Backend, display: Display) -> None:
        self.study = study
        self.backend = backend
        self.clock = backend.clock
        self.display = display
        self.tasks = [Task(cell, study.folder / "jobs" / cell.identity) for cell in study.cells]
        self.spending = Spending(study.budget)
        self.router = BackendRouter(backend, name=study.backend, other=study.other_backend)
        self.running = RunningJobs(self.router, clock=backend.clock, spending=self.spending)
        self.trouble = False
        """Whether something went wrong that the user should look at, though the work went on."""
        self._planned: dict[Task, None] = {}
        """Tasks that may still be started, in order."""
        self._failures = 0
        self._refusals: set[str] = set()

    def run(self) -> int:
        """Run what is missing and return the exit code.

        0: all cells are done or, with ``detach``, submitted; 1: cells are missing or something went wrong; 130: Ctrl-C.
        Raises `TroubleError` when another controller works on the study, when the disk fails, and when the study's
        folder vanishes.
        """
        lock = locked(self.study.folder, self.study.name, clock=self.clock, say=self.display.line)
        with folder_trouble(self.study.folder), lock as self.lease, contextlib.ExitStack() as self.open:
            self._begin()
            try:
                self._work_off()
            except KeyboardInterrupt:
                self._end_workers()
                self.overview.write_index(force=True)
                self.display.close()
                self._say(interrupted(self.tasks, self.study.again))
                return 130
            except LeaseLost:  # the controller that took over has adopted the workers
                raise
            except BaseException:
                self._end_workers(silently=True)
                raise
            finally:
                self._show(force=True)
                self.display.close()
            self.overview.write_index(force=True)
            if self.study.detach and self.running.tasks:
                self._say(detached(len(self.running.tasks), len(self._planned), self.study.again))
                return 0
            self._finish()
        missed = any(task.state != "done" and task.cause != "pruned" for task in self.tasks)
        missed |= self.study.planner is not None and any(
            state != "done" for _, state in self.study.planner.rows()
        )
        return 1 if self.trouble or missed else 0

    def _begin(self) -> None:
        folder = self.study.folder / "jobs"
        self.ledger = Ledger(self.study.folder, study=self.study.name, storage=self.study.storage)
        self.open.callback(self.ledger.close)
        for notice in self.ledger.notices:
            self.trouble = True
            self.display.line(notice)
        write_bytes(self.study.folder / "study.yaml", self.study.source.encode())
        if self.study.planner is not None:
            self.study.planner.begin(self.ledger.storage)
            self.tasks += [Task(cell, folder / cell.identity) for cell in self.study.planner.next(0)]
        self._write_versions(self.tasks[:1])
        (self.study.folder / CANCEL).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        self.overview = Overview(
            self.study.folder, self.tasks, others=self.study.others, display=self.display
        )
        self.overview.listed = None if self.study.planner is None else self.study.planner.rows
        wanted = {task.cell.identity for task in self.tasks} | {cell.identity for cell in self.study.others}
        end_strangers(folder, wanted, self.router, clock=self.clock, say=self.display.line)
        present = {path.name for path in folder.iterdir()}
        self.spending.take_up(folder)
        recorded = {identity for identity, state in self.ledger.states().items() if state == "done"}
        for task in self.tasks:
            if task.cell.identity in recorded and task.cell.finished():
                task.state = "done"
            else:
                recorded.discard(task.cell.identity)
                self._plan(task, has_jobs=task.cell.identity in present)
        fresh = [task for task in self.tasks if task.cell.identity not in recorded]
        self.ledger.sync([(task.entry, task.state, task.work) for task in fresh])
        for task in self.tasks:
            if self.study.planner is not None and task.state not in OPEN:
                self.study.planner.settled(task.cell, task.state, task.cause)
        self.overview.write_index(force=True)

    def _write_versions(self, tasks: Sequence[Task]) -> None:
        for task in tasks:  # the report uses this file to mark results of other versions
            write_json(
                self.study.folder / "versions.json", {**versions(), "plugins": task.cell.plugins.versions()}
            )

    def _plan(self, task: Task, *, has_jobs: bool) -> None:
        if plan(task, self.running, retry_failed=self.study.retry_failed, has_jobs=has_jobs):
            self.display.line(f"{task.cell.name}: its job outlived the last controller and is adopted")
        if task.state == "planned":
            self._planned[task] = None
        self._failures += task.state == "failed"

    # Meanwhile

    def _work_off(self) -> None:
        self._show()
        while True:
            if not self.study.folder.is_dir():
                raise FileNotFoundError(2, "No such file or directory", str(self.study.folder))
            self.lease.check()
            if (self.study.folder / CANCEL).exists():
                self._end_workers(cause="cancelled")
                self.display.line("cancelled on request: what is done is kept, the same command goes on")
                (self.study.folder / CANCEL).unlink(missing_ok=True)
                return
            with self.ledger.batch():
                self._settle()
            started = self._launch()
            self._show()
            self.overview.write_index()
            if self._nothing_left(started):
                return
            self.clock.sleep(self.backend.interval(len(self.running.tasks)))

    def _nothing_left(self, started: bool) -> bool:
        stop = bool(self.spending.exhausted(self._failures))
        if self.study.detach and (stop or not started):  # the next command starts cells that wait for others
            return True
        coming = self._planned or (self.study.planner is not None and not self.study.planner.finished())
        return not self.running.tasks and (stop or not coming)

    def _settle(self) -> None:
        if not self.running.tasks:
            return
        seen = self.router.poll(self.running.jobs())
        for identity, task in list(self.running.tasks.items()):
            self._prune(task)
            status = self.running.judged(task, seen[identity])
            if status.over:
                self._over(task, status, seen[identity])
            elif status.state != task.state:
                self._set(task, status.state, status.reason)
            else:
                task.reason = status.reason

    def _prune(self, task: Task) -> None:
        if self.study.planner is None or task.pruned or task.state != "running" or task.job is None:
            return
        reason = self.study.planner.ends(task.cell)
        if reason is not None:
            task.pruned = reason
            self.router.cancel([task.job])

    def _over(self, task: Task, status: JobStatus, seen: SchedulerStatus) -> None:
        """Settle a job that is over, and decide whether the cell is tried again."""
        job, steps = task.job, task.cell.missing()
        assert job is not None, f"{task.cell.name} is under way"
        if seen.phase != "over":  # its results or its error are written, but its process has not exited
            self.router.cancel([job], now=True)
        status, outcome = self.running.settle(task, status, steps)
        if status.state == "done":
            self._set(task, "done", settled=True)
            return
        task.outcomes.append(outcome)
        if status.cause != "pruned" and try_again(task.outcomes):
            short = status.cause == "out of memory"
            less = smaller(read_json(job.spec) or {}, outcome.stage) if short else {}
            # First cancel what may still run. If that fails, retry only if the old job is certainly over.
            if less is not None and (self.router.cancel([job]) or (seen.phase == "over" and seen.certain)):
                self._retry(task, outcome, less)
                return
        reason = status.reason if status.cause == "pruned" else status.reason + refusal(task.outcomes)
        self._set(task, status.state, reason, status.cause, settled=True)

    def _retry(self, task: Task, outcome: Outcome, less: Mapping[str, int]) -> None:
        self._set(task, "interrupted", outcome.reason, outcome.cause)
        more = f", with {told(less)}" if less else ""
        self.display.line(f"{task.cell.name}: {outcome.reason}; it is tried again{more}")
        task.smaller.update(less)
        task.not_before = self.clock.monotonic() + pause(task.outcomes)
        task.note(task.cell.missing())
        task.state, task.forgiven, task.reason = "planned", True, ""
        self._planned[task] = None

    # Starting

    def _launch(self) -> bool:
        if self.study.planner is not None:
            self._add_cells(self.study.planner)
        if self.spending.over_hours() and self.running.tasks:
            self._end_workers()
        if self.spending.exhausted(self._failures):
            return False
        room = self.backend.free_slots(self.running.jobs())
        busy = frozenset().union(*(task.shared for task in self.running.tasks.values()))
        now = self.clock.monotonic()
        chosen: list[Task] = []
        with self.ledger.batch():
            for task in list(self._planned) if room > 0 else ():
                if len(chosen) >= room:
                    break
                steps = self._to_do(task) if task.not_before <= now else []
                if not steps or shared_stages(steps) & busy:
                    continue  # two cells that need one model never train it twice
                busy |= shared_stages(steps)
                self._take_up(task, steps)
                chosen.append(task)
        if chosen:
            self._submit(chosen)
        return bool(chosen)

    def _add_cells(self, planner: Planner) -> None:
        free = self.backend.free_slots(self.running.jobs()) - len(self._planned)
        known = {task.cell.identity for task in self.tasks} if free > 0 else set()
        for cell in planner.next(free) if free > 0 else ():
            if cell.identity in known:
                continue
            known.add(cell.identity)
            task = Task(cell, self.study.folder / "jobs" / cell.identity)
            self._write_versions([task] if not self.tasks else [])
            self.tasks.append(task)
            self._plan(task, has_jobs=task.folder.is_dir())
            self.ledger.sync([(task.entry, task.state, task.work)])
            self.overview.changed(task)
            if task.state not in OPEN:
                planner.settled(cell, task.state, task.cause)

    def _to_do(self, task: Task) -> list[Step]:
        """Return the missing stages of a cell that may start. Settle a cell that is done or cannot succeed."""
        steps = task.cell.missing()
        if not steps:  # another cell or another study has computed them in the meantime
            self._set(task, "done", settled=True)
            return []
        problem = blocked(task, steps)
        if problem is not None:
            self._set(task, "failed", *problem, settled=True)
            return []
        return steps

    def _take_up(self, task: Task, steps: Sequence[Step]) -> None:
        """Write the spec of a new job."""
        job = task.take_up(self.study.prepare, backend=self.study.backend)
        self.router.own(job)
        self.running.add(task, steps)
        self._set(task, "running" if self.backend.attached else "queued")

    def _submit(self, tasks: Sequence[Task]) -> None:
        self._show()
        jobs: dict[Job, Task] = {task.job: task for task in tasks if task.job is not None}
        problem: TroubleError | None = None
        try:
            # With the backend inline, this returns when the cells have ended.
            self.backend.submit(list(jobs))
        except TroubleError as error:
            problem = error
        finally:
            for job, task in jobs.items():
                if not self.backend.attached and not (job.folder / "job.json").exists():
                    self.running.drop(task)  # the scheduler took fewer jobs: submit this one later
                    shutil.rmtree(job.folder, ignore_errors=True)
                    task.numbers -= 1
                    task.state = "planned"
                    self._planned[task] = None
        if problem is not None:
            if self.backend.attached or not self.running.tasks:
                raise problem
            self._refused(problem)  # the other jobs go on
        elif refused := getattr(self.backend, "refused", ""):
            self.display.line(f"fewer are submitted for now: {refused}")

    def _refused(self, problem: TroubleError) -> None:
        if str(problem) not in self._refusals:
            self._refusals.add(str(problem))
            self._say([f"no more are submitted for now: {message}" for message in problem.messages])

    def _set(
        self, task: Task, state: State, reason: str = "", cause: Cause | None = None, *, settled: bool = False
    ) -> None:
        """Record that ``task`` is in ``state``; ``settled``: it stays so for the rest of this command."""
        self._planned.pop(task, None)
        task.state, task.reason, task.cause = state, reason, cause
        self._failures += settled and state == "failed"
        self.ledger.set(task.entry, state, seconds=task.work, cause=cause)
        if settled:
            task.cell.forget()
        self.overview.changed(task)
        if settled and self.study.planner is not None:
            self.study.planner.settled(task.cell, state, cause)

    def tick(self) -> None:
        """Update the display; the backend inline calls this while a cell runs."""
        self._show()

    def _show(self, *, force: bool = False) -> None:
        progress = dict(self.running.progress)
        if self.backend.attached:
            for task in self.running.tasks.values():
                progress[task] = task.stage_progress()
        slots = len(self.running.tasks) + max(0, self.backend.free_slots(self.running.jobs()))
        self.overview.show(progress, slots=slots, now=self.clock.monotonic(), force=force)

    # After

    def _end_workers(self, *, silently: bool = False, cause: Cause | None = None) -> None:
        jobs = [] if self.backend.attached else self.running.jobs()
        if jobs:
            self.display.line("ending the workers ...")
        end_jobs(self.router, jobs, clock=self.clock)
        for task in list(self.running.tasks.values()):
            if silently:
                task.state = "interrupted"
                continue
            steps = task.cell.missing()
            state: State = "done" if not steps else "cancelled" if cause == "cancelled" else "interrupted"
            reason = "" if not steps else cause or "ended by this command"
            with contextlib.suppress(OSError):
                status = JobStatus(state=state, over=True, cause=cause or "killed", reason=reason)
                self.running.record(task, status, steps)
            self.running.drop(task)
            self._set(task, state, "" if state == "done" else reason, cause, settled=True)

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.display.line(line)

    def _finish(self) -> None:
        self._say(shortfalls(self.tasks))
        stop = self.spending.exhausted(self._failures)
        if stop and any(task.state != "done" for task in self.tasks):
            self.trouble = True
            self.display.line(stop)
        if self.study.report is not None:
            try:
                self.display.line(self.study.report(self.study.folder))
            except HpdmError as error:
                self.trouble = True
                self._say([f"error: report: {message}" for message in error.messages])
        if self.tasks:
            Observers(self.tasks[0].cell.plugins, None).study_finished(self.study.folder)
