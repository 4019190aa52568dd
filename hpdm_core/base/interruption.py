"""Being asked to end, by Ctrl-C's relatives: SIGTERM (cancelled, preempted) and SIGUSR2 (time is up).

Work that can be saved between steps runs within `deferred`: there a first request is only noted, and the work
ends itself with `Interrupted` after it has saved. A second request, or one outside of such work, ends at once.
Signals belong to the whole process, so this is the one place that holds what they said.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "deferred", "requested", "shielded", "watched"]


class Interrupted(SystemExit):
    """The process was asked to end, and does: no error, and nothing that a handler of errors should catch."""

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
    """Within the block a first request is noted and left to the work. Raises `Interrupted` when there is one
    already, and at the end of the block when one came that the work had no more use for.
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
    """Within the block SIGTERM and SIGUSR2 are requests to end; in a thread nothing is changed."""
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
    """Within the block Ctrl-C and SIGTERM wait; they are dealt with at its end. In a thread nothing is changed.

    For what must not be torn apart, as taking and giving back a lock. Keep it short.
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
