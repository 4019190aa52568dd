"""A cell as the controller handles it, and the folders of its jobs.

jobs/<cell>/<number>/     one job, see `hpdm_core.study.backends.interface`
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdm_core.base.files import read_json, write_json
from hpdm_core.cell import Cell, Step
from hpdm_core.cell.mark import Mark, mark_of
from hpdm_core.store.failures import Cause
from hpdm_core.study.backends.interface import Job
from hpdm_core.study.controller.retries import Outcome, with_runtime
from hpdm_core.study.controller.states import State
from hpdm_core.study.ledger.ledger import LedgerCell

__all__ = ["Task", "jobs_in", "last_lines", "shared_stages"]

TAIL_LINES = 3
TAIL_BYTES = 4096


@dataclass(eq=False)
class Task:
    """One cell as the controller handles it."""

    cell: Cell
    folder: Path
    """The folder of its jobs."""
    state: State = "planned"
    cause: Cause | None = None
    reason: str = ""
    job: Job | None = None
    """The job under way."""
    numbers: int = 0
    """Number of jobs so far, over all commands."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Outcomes of earlier jobs, oldest first; `hpdm_core.study.controller.retries` decides by them."""
    begun: Mark = field(default_factory=list)
    """How far the cell was when its newest job was written."""
    shared: frozenset[Path] = frozenset()
    """Folders of the stages that the job computes and that other cells may need too."""
    before: dict[Path, int] = field(default_factory=dict)
    """Folder of each missing stage -> number of its newest attempt before this command, or before the last retry."""
    forgiven: bool = False
    """Whether earlier failures are ignored, so that the cell is tried again."""
    pruned: str = ""
    """Why the planner ended it; empty if it did not."""
    smaller: dict[str, int] = field(default_factory=dict)
    """Settings of ``runtime:`` for retries after it ran out of memory."""
    not_before: float = float("-inf")
    """Time of the controller's clock before which it is not retried."""
    started: float = 0.0
    """Time of the controller's clock when its job was started or adopted."""
    seconds: float | None = None
    """Duration of its last job in this command."""
    tail: str = ""
    """The last lines of its log, if its worker exited without reporting a result."""

    @property
    def entry(self) -> LedgerCell:
        """The cell as the ledger records it."""
        return LedgerCell(identity=self.cell.identity, arm=self.cell.arm, seed=self.cell.seed)

    @property
    def log(self) -> Path:
        """The log of the newest attempt at a missing stage, or the log folder of the newest job."""
        for step in self.cell.missing():
            attempts = step.stage.attempts()
            if attempts and (attempts[-1] / "log.txt").exists():
                return attempts[-1] / "log.txt"
        return self.folder / str(self.numbers) / "log" if self.numbers else self.folder

    @property
    def work(self) -> float:
        """Seconds of work in its stages, once all are done; 0 before."""
        if self.state != "done":
            return 0.0
        return float(sum(result.get("wall_seconds", 0.0) for result in self.cell.results().values()))

    def take_up(self, prepare: Callable[[dict[str, Any]], dict[str, Any]] | None, *, backend: str) -> Job:
        """Make a new job for ``backend``: write its spec, which ``prepare`` may change, and return the job."""
        number = self.numbers + 1
        job = Job(cell=self.cell.identity, number=number, folder=self.folder / str(number))
        spec = with_runtime(self.cell.spec(), self.smaller)
        if prepare is not None:
            spec = prepare(spec)
        self.begun = mark_of(self.cell)
        self.folder.mkdir(exist_ok=True)
        job.folder.mkdir()
        write_json(
            job.spec, {**spec, "attempt": job.id, "backend": backend, "begun": self.begun}, durable=False
        )
        self.job, self.numbers = job, number
        return job

    def note(self, steps: Sequence[Step]) -> None:
        """Record the newest attempts at the missing ``steps``, so that later ones can be told from them."""
        self.before = {step.stage.folder: step.stage.newest() for step in steps}

    def stage_progress(self) -> Mapping[str, Any]:
        """Return the heartbeat of the first missing stage, for jobs in this process, which write none themselves.

        Empty while no process holds the stage's lease: its newest heartbeat is then that of an ended attempt.
        """
        for step in self.cell.missing()[:1]:
            if step.stage.holder() is not None:
                return step.stage.progress() or {}
        return {}

    def error(self, steps: Sequence[Step]) -> Mapping[str, Any] | None:
        """Return the error of the job under way, or of a newer attempt at a missing stage than `note` recorded."""
        own = None if self.job is None else read_json(self.job.folder / "error.json")
        if own is not None:
            return own
        for step in steps:
            if step.stage.newest() > self.before.get(step.stage.folder, 0):
                failure = step.stage.failure()
                if failure is not None:
                    return failure
        return None


def jobs_in(folder: Path, cell: str) -> list[Job]:
    """Return the jobs of ``cell`` in its folder, oldest first."""
    try:
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Job(cell=cell, number=number, folder=folder / str(number)) for number in numbers]


def shared_stages(steps: Sequence[Step]) -> frozenset[Path]:
    """Return the stages that other cells may need too; two cells that need one model never train it twice."""
    return frozenset(step.stage.folder for step in steps if step.stage.kind != "evaluations")


def last_lines(path: Path, job: Job | None) -> str:
    """Return the last lines of the log ``path``, or if it is empty or missing, of the output of ``job``."""
    candidates = [path]
    if job is not None:
        data = read_json(job.folder / "job.json") or {}
        number = str(data.get("slurm") or "")
        folders = [job.folder / "log", *([Path(data["log"])] if data.get("log") else [])]
        for folder in folders:
            if folder.is_dir():
                candidates += sorted(folder.glob(f"{number}*_log.out"))
    for candidate in candidates:
        try:
            with candidate.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            continue
        lines = [line for line in text.splitlines() if line.strip()]
        if lines:
            return "\n".join(lines[-TAIL_LINES:])
    return ""
