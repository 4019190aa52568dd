"""What a worker needs besides its cell: a heartbeat for those who watch, and an end that leaves nothing
locked.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hpdm_core.study.store import Attempt

__all__ = ["Progress", "Reporter", "ended_by_sigterm"]

Progress = Callable[[dict[str, Any]], None]


class Reporter:
    """Writes an attempt's heartbeat, about once a second, and passes progress on."""

    def __init__(self, name: str, attempt: Attempt, forward: Progress | None) -> None:
        self._name = name
        self._attempt = attempt
        self._forward = forward
        self._started = time.time()
        self._first: int | None = None
        self._first_time: float | None = None
        self._last = float("-inf")

    def __call__(self, progress: dict[str, Any]) -> None:
        """Take note of ``progress``: ``step``, ``steps``, ``loss`` and whatever else."""
        now = time.monotonic()
        finished = progress.get("step") is not None and progress.get("step") == progress.get("steps")
        if now - self._last < 1.0 and not finished:
            return
        self._last = now
        if self._first is None and progress.get("step") is not None:
            self._first, self._first_time = progress["step"], time.time()
        whole = {
            "stage": self._name,
            "started": self._started,
            "first": self._first,
            "first_time": self._first_time,
            **progress,
            "time": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk shows where something matters
            self._attempt.heartbeat(whole)
        if self._forward is not None:
            self._forward(whole)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit; submitit's own handler would ignore it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
