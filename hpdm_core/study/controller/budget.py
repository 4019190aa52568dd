"""A study's budget of GPU hours and failures. GPU hours are counted from the heartbeats of its jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdm_core.base.files import read_json
from hpdm_core.config.study_keys import Budget
from hpdm_core.study.backends.interface import Job
from hpdm_core.study.controller.tasks import jobs_in

__all__ = ["Spending"]


class Spending:
    """Counts what a study has spent of ``budget``."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._seconds: dict[str, float] = {}

    def add(self, jobs: Sequence[Job]) -> None:
        """Count earlier jobs."""
        if self._budget.max_gpu_hours is None:
            return
        for job in jobs:
            beat = read_json(job.folder / "heartbeat.json")
            if beat is not None:
                self.note(job, beat)

    def take_up(self, folder: Path) -> None:
        """Count every job below ``folder``, also those of cells that are done."""
        for path in folder.iterdir() if self._budget.max_gpu_hours is not None else ():
            self.add(jobs_in(path, path.name))

    def note(self, job: Job, beat: Mapping[str, Any]) -> None:
        """Update the GPU time of ``job`` from its heartbeat."""
        if self._budget.max_gpu_hours is not None:
            self._seconds[job.id] = float(beat.get("seconds", 0.0)) * int(beat.get("gpus", 0))

    @property
    def gpu_hours(self) -> float:
        """GPU hours so far."""
        return sum(self._seconds.values()) / 3600

    def over_hours(self) -> bool:
        """Whether the GPU hours are spent."""
        limit = self._budget.max_gpu_hours
        return limit is not None and self.gpu_hours >= limit

    def exhausted(self, failures: int) -> str:
        """Return a line for the user saying why no more jobs are started, or an empty string."""
        if self.over_hours():
            return (
                f"budget: {self.gpu_hours:.3g} of {self._budget.max_gpu_hours:g} GPU hours are spent; raise "
                "budget.max_gpu_hours to go on"
            )
        if self._budget.max_failures is not None and failures >= self._budget.max_failures:
            return (
                f"budget: {failures} cells have failed, and {self._budget.max_failures} may; raise "
                "budget.max_failures to go on, or repair them"
            )
        return ""
