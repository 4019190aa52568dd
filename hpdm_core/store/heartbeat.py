"""A worker's heartbeat files: one per attempt at a stage, and one per job.

Both are replaced atomically. The job's file holds a counter that a thread increments, so that a worker counts as alive
during a training step of many minutes. Watchers compare counters, never clocks of two hosts.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpdm_core.base.files import read_json, write_json
from hpdm_core.store.lease import Process
from hpdm_core.store.stages import Attempt

__all__ = ["BEAT_SECONDS", "JobHeartbeat", "Progress", "Reporter"]

BEAT_SECONDS = 5.0
SHOW_SECONDS = 1.0

Progress = Callable[[dict[str, Any]], None]


class Reporter:
    """Writes an attempt's heartbeat about once a second, and passes it on to ``forward``."""

    def __init__(self, name: str, attempt: Attempt, forward: Progress | None) -> None:
        self._name = name
        self._attempt = attempt
        self._forward = forward
        self._started = time.time()
        self._first: int | None = None
        self._first_time: float | None = None
        self._last = float("-inf")

    def __call__(self, progress: dict[str, Any]) -> None:
        """Write ``progress`` (``step``, ``steps``, ``loss`` and others) at most once a second.

        The first and the last step are always written.
        """
        now = time.monotonic()
        step = progress.get("step")
        first = self._first is None and step is not None
        finished = step is not None and step == progress.get("steps")
        if now - self._last < 1.0 and not first and not finished:
            return
        self._last = now
        if first:
            self._first, self._first_time = step, time.time()
        whole = {
            "stage": self._name,
            "started": self._started,
            "first": self._first,
            "first_time": self._first_time,
            **progress,
            "time": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk raises where more than a heartbeat is lost
            self._attempt.heartbeat(whole)
        if self._forward is not None:
            self._forward(whole)


class JobHeartbeat:
    """Writes ``heartbeat.json`` and ``worker.json`` (which process runs the job) into a job's folder, within a block.

    A requeued job has one `JobHeartbeat` after the other. Once ``worker.json`` names another process, an older one
    writes nothing more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gpus = 0
        """GPUs that the job holds, for budgets."""
        self._me = {**Process.here().to_json(), "born": time.monotonic_ns()}
        self._before = float((read_json(folder / "heartbeat.json") or {}).get("seconds", 0.0))
        self._started = time.monotonic()
        self._shown: dict[str, Any] = {}
        self._beat = 0
        self._last = float("-inf")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "JobHeartbeat":
        write_json(self.folder / "worker.json", self._me, durable=False)
        for name in ("end.json", "error.json"):  # from before the job was requeued
            (self.folder / name).unlink(missing_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    @property
    def seconds(self) -> float:
        """Seconds since this heartbeat was made."""
        return time.monotonic() - self._started

    def mine(self) -> bool:
        """Whether no other process has taken the job over."""
        return read_json(self.folder / "worker.json") == self._me

    def show(self, progress: dict[str, Any]) -> None:
        """Add ``progress`` to the heartbeat, which is written at most once a second."""
        self._shown = progress
        if time.monotonic() - self._last >= SHOW_SECONDS:
            self._write()

    def say(self, name: str, data: dict[str, Any]) -> None:
        """Write the file ``name`` into the job's folder, unless another process runs the job or the disk is full."""
        with contextlib.suppress(OSError):
            if self.mine():
                write_json(self.folder / name, data)

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if not self.mine():
                return
            self._beat += 1
            self._last = time.monotonic()
            total = self._before + self.seconds
            data = {**self._shown, "beat": self._beat, "born": self._me["born"], "seconds": total}
            write_json(self.folder / "heartbeat.json", {**data, "gpus": self.gpus}, durable=False)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._write()
