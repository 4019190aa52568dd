"""Requests to end the process: SIGTERM (job cancelled or preempted) and SIGUSR2 (time limit reached).

Work that can be saved between steps runs within `deferred`. There, a first request is only recorded; the work
saves and then raises `Interrupted`. A second request, or one outside `deferred`, ends the process at once.
Signal handlers belong to the whole process, so their state is kept in this module alone.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "deferred", "requested", "shielded", "watched"]


class Interrupted(SystemExit):
    """The process was asked to end and ends. This is not an error, and error handlers should not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _Requests:
    signum: int | None = None
    deferring = False


_requests = _Requests()


def requested() -> int | None:
    """Return the signal that asked this process to end, or None."""
    return _requests.signum


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block, a first request is only recorded; the work asks for it by `requested`.

    Raises `Interrupted` at the start if there was a request before, and at the end if one came during the block.
    """
    if _requests.signum is not None:
        raise Interrupted(_requests.signum)
    before, _requests.deferring = _requests.deferring, True
    try:
        yield
    finally:
        _requests.deferring = before
    if _requests.signum is not None:
        raise Interrupted(_requests.signum)


def _heard(signum: int, frame: FrameType | None) -> None:
    first = _requests.signum is None
    if first:
        _requests.signum = signum
    if not (first and _requests.deferring):
        raise Interrupted(_requests.signum or signum)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block, SIGTERM and SIGUSR2 are requests to end; outside the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = [signal.SIGTERM, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])]
    before = {each: signal.signal(each, _heard) for each in signals}
    _requests.signum = None
    try:
        yield
    finally:
        _requests.signum = None
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block. Outside the main thread nothing is changed.

    For short operations that must not be interrupted halfway, such as acquiring or releasing a lock.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            before[each] = signal.signal(each, lambda signum, frame: heard.append(signum))
        yield
    finally:
        for each in reversed(before):
            signal.signal(each, before[each])
        if heard:
            signal.raise_signal(heard[0])
